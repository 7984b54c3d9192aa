//! Records as CRI shows them, and CRI's filters over them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use isopod_proto::agent;

use crate::container::{ContainerRecord, ContainerState};
use crate::cri;
use crate::sandbox::SandboxRecord;
use crate::sandbox::exec::Outcome;

fn has_labels(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether every part of `filter` that is given is true of the sandbox. An id may be shortened.
pub fn sandbox_matches(record: &SandboxRecord, filter: &cri::PodSandboxFilter) -> bool {
    record.id.as_str().starts_with(&filter.id)
        && filter.state.as_ref().is_none_or(|state| state.state() == record.phase.to_cri())
        && has_labels(&record.config.labels, &filter.label_selector)
}

/// Whether every part of `filter` that is given is true of the container. Ids may be shortened.
pub fn container_matches(record: &ContainerRecord, filter: &cri::ContainerFilter) -> bool {
    record.id.as_str().starts_with(&filter.id)
        && record.sandbox.as_str().starts_with(&filter.pod_sandbox_id)
        && filter.state.as_ref().is_none_or(|state| state.state() == record.state.to_cri())
        && has_labels(&record.config.labels, &filter.label_selector)
}

/// A sandbox in a list.
pub fn sandbox_item(record: &SandboxRecord) -> cri::PodSandbox {
    cri::PodSandbox {
        id: record.id.to_string(),
        metadata: record.config.metadata.clone(),
        state: record.phase.to_cri().into(),
        created_at: record.created_at,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

/// The status of a sandbox.
pub fn sandbox_status(record: &SandboxRecord) -> cri::PodSandboxStatus {
    let context = record.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.clone()).unwrap_or_default();
    let mut ips = record.network.iter().flat_map(|network| network.ips()).map(|ip| ip.to_string());
    let network = cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    };
    cri::PodSandboxStatus {
        id: record.id.to_string(),
        metadata: record.config.metadata.clone(),
        state: record.phase.to_cri().into(),
        created_at: record.created_at,
        network: Some(network),
        linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options: Some(options) }) }),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

/// What `crictl inspectp` shows besides.
pub fn sandbox_info(record: &SandboxRecord) -> HashMap<String, String> {
    let info = serde_json::json!({
        "pid": record.vm.map(|vm| vm.pid),
        "config": record.config,
        "cgroup": record.cgroup,
        "runtimeHandler": record.runtime_handler,
    });
    [("info".to_owned(), info.to_string())].into()
}

/// The image as the container's creator named it.
fn image(record: &ContainerRecord) -> cri::ImageSpec {
    record.config.image.clone().unwrap_or_default()
}

/// A container in a list.
pub fn container_item(record: &ContainerRecord) -> cri::Container {
    cri::Container {
        id: record.id.to_string(),
        pod_sandbox_id: record.sandbox.to_string(),
        metadata: record.config.metadata.clone(),
        image: Some(image(record)),
        image_ref: record.image_id.clone(),
        state: record.state.to_cri().into(),
        created_at: record.created_at,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        image_id: record.image_id.clone(),
    }
}

/// The status of a container: here an exit becomes what the kubelet reads.
pub fn container_status(record: &ContainerRecord) -> cri::ContainerStatus {
    let exit = match &record.state {
        ContainerState::Exited(exit) => Some(exit),
        ContainerState::Created | ContainerState::Running { .. } => None,
    };
    let linux = record.config.linux.clone().unwrap_or_default();
    let user = record.user.as_ref().map(|user| cri::ContainerUser {
        linux: Some(cri::LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: user.supplemental_groups.iter().map(|gid| i64::from(*gid)).collect(),
        }),
    });
    cri::ContainerStatus {
        id: record.id.to_string(),
        metadata: record.config.metadata.clone(),
        state: record.state.to_cri().into(),
        created_at: record.created_at,
        started_at: record.state.started_at(),
        finished_at: exit.map(|exit| exit.finished_at).unwrap_or_default(),
        exit_code: exit.map(|exit| exit.exit_code).unwrap_or_default(),
        image: Some(image(record)),
        image_ref: record.image_id.clone(),
        reason: exit.map(|exit| exit.reason.clone()).unwrap_or_default(),
        message: exit.map(|exit| exit.message.clone()).unwrap_or_default(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        mounts: record.config.mounts.clone(),
        log_path: record.log_path.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
        resources: Some(cri::ContainerResources { linux: Some(linux.resources.unwrap_or_default()) }),
        image_id: record.image_id.clone(),
        user,
        stop_signal: record.config.stop_signal,
    }
}

/// What `crictl inspect` shows besides.
pub fn container_info(record: &ContainerRecord) -> HashMap<String, String> {
    let info = serde_json::json!({
        "sandboxID": record.sandbox.as_str(),
        "config": record.config,
        "imageLayers": record.layers,
    });
    [("info".to_owned(), info.to_string())].into()
}

/// The reply to ExecSync, within the size of a message.
pub fn exec_reply(outcome: Outcome) -> cri::ExecSyncResponse {
    let Outcome { mut stdout, mut stderr, exit_code } = outcome;
    // Room for the fields' own bytes; each output may be cut, the larger one first.
    let most = cri::MAX_MESSAGE - 1024;
    let excess = |stdout: &[u8], stderr: &[u8]| (stdout.len() + stderr.len()).saturating_sub(most);
    if stdout.len() >= stderr.len() {
        stdout.truncate(stdout.len() - excess(&stdout, &stderr).min(stdout.len()));
    } else {
        stderr.truncate(stderr.len() - excess(&stdout, &stderr).min(stderr.len()));
    }
    let excess = excess(&stdout, &stderr);
    stderr.truncate(stderr.len() - excess);
    cri::ExecSyncResponse { stdout, stderr, exit_code }
}

/// A container of which there are no counters.
pub fn without_counters(record: &ContainerRecord) -> cri::ContainerStats {
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: record.id.to_string(),
            metadata: record.config.metadata.clone(),
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
        }),
        ..Default::default()
    }
}

/// The counters of `records` out of a guest's. Scratch disks are below `root`.
pub fn stats(records: &[Arc<ContainerRecord>], stats: &agent::StatsResponse, root: &Path) -> Vec<cri::ContainerStats> {
    let of = |record: &Arc<ContainerRecord>| {
        let counters = stats.containers.iter().find(|counters| counters.id == record.id.as_str())?;
        Some(container_stats(record, counters, root))
    };
    records.iter().filter_map(of).collect()
}

fn container_stats(record: &ContainerRecord, counters: &agent::ContainerStats, root: &Path) -> cri::ContainerStats {
    let timestamp = counters.timestamp_nanos;
    let value = |value: Option<u64>| value.map(|value| cri::UInt64Value { value });
    let cpu = cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(counters.cpu_usage_micros.map(|micros| micros.saturating_mul(1000))),
        usage_nano_cores: None,
        psi: None,
    };
    let memory = cri::MemoryUsage {
        timestamp,
        working_set_bytes: value(counters.memory_working_set_bytes),
        available_bytes: None,
        usage_bytes: value(counters.memory_usage_bytes),
        rss_bytes: value(counters.memory_rss_bytes),
        page_faults: value(counters.page_faults),
        major_page_faults: value(counters.major_page_faults),
        psi: None,
    };
    let writable_layer = cri::FilesystemUsage {
        timestamp,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: root.display().to_string() }),
        used_bytes: value(counters.writable_layer_bytes),
        inodes_used: value(counters.writable_layer_inodes),
    };
    cri::ContainerStats {
        cpu: Some(cpu),
        memory: Some(memory),
        writable_layer: Some(writable_layer),
        ..without_counters(record)
    }
}

#[cfg(test)]
mod tests {
    use isopod_proto::ObjectId;

    use super::*;
    use crate::container::reason;

    fn container() -> ContainerRecord {
        ContainerRecord {
            id: ObjectId::from_random([0xab; 32]),
            sandbox: ObjectId::from_random([0xcd; 32]),
            config: cri::ContainerConfig {
                labels: [("app".to_owned(), "web".to_owned())].into(),
                image: Some(cri::ImageSpec { image: "sha256:00".into(), ..Default::default() }),
                ..Default::default()
            },
            image_id: "sha256:00".into(),
            layers: 1,
            created_at: 1,
            state: ContainerState::Running { started_at: 5 },
            log_path: None,
            volume_disks: Vec::new(),
            stop_signal: 15,
            user: None,
            process: Vec::new(),
        }
    }

    #[test]
    fn a_filter_is_true_only_if_all_of_it_is() {
        let record = container();
        let matches = |filter| container_matches(&record, &filter);
        assert!(matches(cri::ContainerFilter::default()));
        assert!(matches(cri::ContainerFilter { id: "abab".into(), pod_sandbox_id: "cd".into(), ..Default::default() }));
        assert!(!matches(cri::ContainerFilter { id: "abac".into(), ..Default::default() }));
        let labelled = |value: &str| cri::ContainerFilter {
            label_selector: [("app".to_owned(), value.to_owned())].into(),
            ..Default::default()
        };
        assert!(matches(labelled("web")));
        assert!(!matches(labelled("db")));
        let state = |state: cri::ContainerState| cri::ContainerFilter {
            state: Some(cri::ContainerStateValue { state: state.into() }),
            ..labelled("web")
        };
        assert!(matches(state(cri::ContainerState::ContainerRunning)));
        assert!(!matches(state(cri::ContainerState::ContainerCreated)));
    }

    #[test]
    fn a_sandbox_filter_is_true_only_if_all_of_it_is() {
        let mut record = SandboxRecord::for_tests(ObjectId::from_random([0xab; 32]));
        record.config.labels.insert("a".into(), "b".into());
        let ready = Some(cri::PodSandboxStateValue { state: cri::PodSandboxState::SandboxReady.into() });
        let label_selector: HashMap<_, _> = [("a".to_owned(), "b".to_owned())].into();
        let filter = cri::PodSandboxFilter { id: record.id.to_string(), state: ready, label_selector };
        assert!(sandbox_matches(&record, &filter));
        record.phase = crate::sandbox::SandboxPhase::NotReady;
        assert!(!sandbox_matches(&record, &filter));
    }

    #[test]
    fn an_exit_is_told_with_its_code_and_reason() {
        let mut record = container();
        let running = container_status(&record);
        assert_eq!((running.exit_code, running.finished_at, running.reason.as_str()), (0, 0, ""));
        record.state = ContainerState::Exited(record.state.ended(137, true, 9));
        let status = container_status(&record);
        assert_eq!(status.state(), cri::ContainerState::ContainerExited);
        assert_eq!((status.exit_code, status.started_at, status.finished_at), (137, 5, 9));
        assert_eq!(status.reason, reason::OOM_KILLED);
    }

    #[test]
    fn what_the_guest_does_not_know_is_absent_and_not_zero() {
        let record = Arc::new(container());
        let counters = agent::ContainerStats {
            id: record.id.to_string(),
            timestamp_nanos: 7,
            cpu_usage_micros: Some(3),
            ..Default::default()
        };
        let guest = agent::StatsResponse { containers: vec![counters], ..Default::default() };
        let shown = stats(&[record], &guest, Path::new("/x")).pop().expect("one");
        assert_eq!(shown.cpu.expect("given").usage_core_nano_seconds, Some(cri::UInt64Value { value: 3000 }));
        assert_eq!(shown.memory.expect("given").working_set_bytes, None);
    }

    #[test]
    fn an_exec_reply_fits_into_a_message() {
        use prost::Message;
        let most = cri::MAX_MESSAGE;
        for (stdout, stderr) in [(most, most), (most, 0), (0, most), (10, most), (5, 6)] {
            let outcome = Outcome { stdout: vec![1; stdout], stderr: vec![2; stderr], exit_code: 3 };
            let reply = exec_reply(outcome);
            assert!(reply.encoded_len() <= most, "{stdout} {stderr}");
            assert!(stdout + stderr > 100 || (reply.stdout.len(), reply.stderr.len()) == (stdout, stderr));
        }
    }
}
