//! The metrics of cAdvisor, as CRI gives them out: names, meanings and units are cAdvisor's, and so are 0 for a limit that is
//! none and whole seconds, as a value is an integer. A metric whose value is not known has no sample.

mod families;

use std::sync::Arc;

use isopod_proto::agent::StatsResponse;

use super::counters;
use crate::container::ContainerRecord;
use crate::cri;
use crate::sandbox::SandboxRecord;

use families::{FAMILIES, Family, Of, Samples, Source};

/// The labels that every sample has, before those of its family.
const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];
/// What stands for the pod itself in `container`, as there is no container that its network belongs to.
const POD: &str = "POD";

/// All metrics.
pub fn descriptors() -> Vec<cri::MetricDescriptor> {
    let keys = |family: &Family| LABELS.iter().chain(family.labels).map(|&key| key.to_owned()).collect();
    let descriptor = |family: &Family| cri::MetricDescriptor {
        name: family.name.to_owned(),
        help: family.help.to_owned(),
        label_keys: keys(family),
    };
    FAMILIES.iter().map(descriptor).collect()
}

/// The metrics of a sandbox and of `containers`, those of it that run.
pub fn of_pod(
    sandbox: &SandboxRecord,
    containers: &[Arc<ContainerRecord>],
    guest: &StatsResponse,
) -> cri::PodSandboxMetrics {
    let pod = sandbox.config.metadata.clone().unwrap_or_default();
    let own = [sandbox.id.as_str(), &pod.name, "", POD, &pod.name, &pod.namespace].map(str::to_owned);
    let of_pod = |family: &Family| match family.of {
        Of::Pod(samples) => samples(guest),
        Of::Container(_) => Samples::new(),
    };
    let of = |record: &Arc<ContainerRecord>| {
        let source = Source::new(record, counters::of(record, guest)?);
        let name = record.config.metadata.clone().unwrap_or_default().name;
        let image = record.config.image.clone().unwrap_or_default().image;
        let own = [record.id.as_str(), &name, &image, &name, &pod.name, &pod.namespace].map(str::to_owned);
        let samples = |family: &Family| match family.of {
            Of::Container(samples) => samples(&source),
            Of::Pod(_) => Samples::new(),
        };
        let metrics = metrics(&own, source.counters.timestamp_nanos, samples);
        Some(cri::ContainerMetrics { container_id: record.id.to_string(), metrics })
    };
    cri::PodSandboxMetrics {
        pod_sandbox_id: sandbox.id.to_string(),
        metrics: metrics(&own, guest.timestamp_nanos, of_pod),
        container_metrics: containers.iter().filter_map(of).collect(),
    }
}

fn metrics(own: &[String], timestamp: i64, samples: impl Fn(&Family) -> Samples) -> Vec<cri::Metric> {
    let metric = |family: &Family, (labels, value): (Vec<String>, u64)| cri::Metric {
        name: family.name.to_owned(),
        timestamp,
        metric_type: family.kind.into(),
        label_values: own.iter().cloned().chain(labels).collect(),
        value: Some(cri::UInt64Value { value }),
    };
    FAMILIES.iter().flat_map(|family| samples(family).into_iter().map(|sample| metric(family, sample))).collect()
}

#[cfg(test)]
mod tests;
