//! Statistics and metrics: of containers and pods, and their truth.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use isopod_cri_server::cri;
use isopod_tests::fixture::{Cri, LogLine, TestContainer, TestPod, shell};
use rustix::process::{Pid, Signal, kill_process};
use tonic::Code;

const LIMIT: u64 = 64 << 20;

/// A pod with a container that has limits, a file of 3 MiB, a socket and two processes.
async fn pod_with_load(stem: &str) -> anyhow::Result<(TestPod, TestContainer)> {
    let pod = TestPod::run(stem).await?;
    let mut config =
        shell("load", "dd if=/dev/zero of=/file bs=1M count=3; sync; echo ready; nc -l -p 4000 & sleep 1000");
    config.labels.insert("pod".to_owned(), pod.config.labels["test"].clone());
    config.linux.get_or_insert_default().resources = Some(cri::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 90_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: LIMIT as i64,
        ..Default::default()
    });
    let container = pod.start(config).await?;
    let ready = |lines: &[LogLine]| lines.iter().any(|line| line.content == b"ready");
    container.logged("output", Duration::from_secs(60), ready).await?;
    // Something is sent, whether or not it is answered.
    container.sh("ping -c 1 -W 1 $(ip route | awk '/default/ {print $3}') || true").await?;
    Ok((pod, container))
}

async fn stats(cri: &Cri, id: &str) -> Result<cri::ContainerStats, tonic::Status> {
    let request = cri::ContainerStatsRequest { container_id: id.to_owned() };
    let answer = cri.runtime.clone().container_stats(request).await?.into_inner();
    answer.stats.ok_or_else(|| tonic::Status::internal("no statistics"))
}

fn number(value: Option<cri::UInt64Value>) -> anyhow::Result<u64> {
    value.map(|value| value.value).context("a value is not known")
}

#[tokio::test]
async fn counters_of_a_container_and_its_pod_are_true() -> anyhow::Result<()> {
    let (pod, container) = pod_with_load("stats").await?;
    let mut runtime = pod.cri.runtime.clone();

    let first = stats(&pod.cri, &container.id).await?;
    container.sh("n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done").await?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let seen = stats(&pod.cri, &container.id).await?;
    let cpu = seen.cpu.context("no cpu")?;
    let before = number(first.cpu.context("no cpu")?.usage_core_nano_seconds)?;
    ensure!(number(cpu.usage_core_nano_seconds)? > before && cpu.timestamp > 0, "{cpu:?}");
    ensure!(number(cpu.usage_nano_cores)? > 0, "{cpu:?}");
    ensure!(cpu.psi.and_then(|psi| psi.some).is_some(), "the guest's kernel has pressure information");
    let memory = seen.memory.context("no memory")?;
    let (used, set) = (number(memory.usage_bytes)?, number(memory.working_set_bytes)?);
    ensure!(set > 0 && set <= used && used <= LIMIT && number(memory.rss_bytes)? < LIMIT, "{memory:?}");
    ensure!(number(memory.available_bytes)? == LIMIT - set && number(memory.page_faults)? > 0, "{memory:?}");
    let layer = seen.writable_layer.clone().context("no writable layer")?;
    ensure!((3 << 20..4 << 20).contains(&number(layer.used_bytes)?), "{layer:?}");
    ensure!((2..10).contains(&number(layer.inodes_used)?) && layer.timestamp > 0, "{layer:?}");
    ensure!(Path::new(&layer.fs_id.context("no mount point")?.mountpoint).is_dir());
    ensure!(number(seen.swap.context("a guest knows that it has no swap")?.swap_usage_bytes)? == 0);

    let request = cri::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let of_pod = runtime.pod_sandbox_stats(request).await?.into_inner().stats.context("no statistics")?;
    let linux = of_pod.linux.context("no linux")?;
    ensure!(of_pod.attributes.context("no attributes")?.labels == pod.config.labels);
    ensure!(number(linux.cpu.context("no cpu")?.usage_core_nano_seconds)? >= number(cpu.usage_core_nano_seconds)?);
    ensure!(number(linux.memory.context("no memory")?.usage_bytes)? >= set);
    ensure!((2..20).contains(&number(linux.process.context("no processes")?.process_count)?));
    let interface = linux.network.context("no network")?.default_interface.context("no interface")?;
    ensure!(interface.name == "eth0" && number(interface.tx_bytes)? > 0, "{interface:?}");
    ensure!(linux.containers.iter().any(|it| it.attributes.as_ref().is_some_and(|it| it.id == container.id)));

    let filter = Some(cri::PodSandboxStatsFilter { label_selector: pod.config.labels.clone(), ..Default::default() });
    let request = cri::ListPodSandboxStatsRequest { filter: filter.clone() };
    let listed = runtime.list_pod_sandbox_stats(request).await?.into_inner().stats;
    let ids = |list: &[cri::PodSandboxStats]| -> Vec<String> {
        list.iter().filter_map(|stats| stats.attributes.as_ref()).map(|it| it.id.clone()).collect()
    };
    ensure!(ids(&listed) == std::slice::from_ref(&pod.id));
    let mut stream = runtime.stream_pod_sandbox_stats(cri::StreamPodSandboxStatsRequest { filter }).await?.into_inner();
    ensure!(ids(&stream.message().await?.context("no message")?.pod_sandbox_stats) == std::slice::from_ref(&pod.id));
    ensure!(stream.message().await?.is_none());

    let other =
        cri::ContainerStatsFilter { label_selector: [("pod".into(), "another".into())].into(), ..Default::default() };
    let request = cri::ListContainerStatsRequest { filter: Some(other) };
    ensure!(runtime.list_container_stats(request).await?.into_inner().stats.is_empty());
    ensure!(stats(&pod.cri, "nosuch").await.err().map(|error| error.code()) == Some(Code::NotFound));
    let unknown = runtime.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: "nosuch".into() }).await;
    ensure!(unknown.err().map(|error| error.code()) == Some(Code::NotFound));
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn every_metric_has_a_true_sample() -> anyhow::Result<()> {
    let (pod, container) = pod_with_load("metrics").await?;
    let mut runtime = pod.cri.runtime.clone();
    let descriptors =
        runtime.list_metric_descriptors(cri::ListMetricDescriptorsRequest {}).await?.into_inner().descriptors;
    let keys: BTreeMap<_, _> = descriptors.iter().map(|it| (it.name.as_str(), it.label_keys.as_slice())).collect();
    ensure!(keys.len() == descriptors.len() && keys.len() >= 45, "{} metrics", keys.len());

    let all = runtime.list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {}).await?.into_inner().pod_metrics;
    let own = all.iter().find(|it| it.pod_sandbox_id == pod.id).context("no metrics of the pod")?;
    let of_container = own
        .container_metrics
        .iter()
        .find(|it| it.container_id == container.id)
        .context("no metrics of the container")?;
    let mut sampled = BTreeSet::new();
    for metric in own.metrics.iter().chain(&of_container.metrics) {
        let keys = keys.get(metric.name.as_str()).with_context(|| format!("{} is not described", metric.name))?;
        ensure!(metric.label_values.len() == keys.len() && metric.timestamp > 0, "{metric:?}");
        sampled.insert(metric.name.as_str());
    }
    let without: Vec<_> = keys.keys().filter(|name| !sampled.contains(*name)).collect();
    ensure!(without.is_empty(), "without a sample: {without:?}");

    let label = |metric: &cri::Metric, key: &str| {
        let at = keys[metric.name.as_str()].iter().position(|found| found == key);
        at.map(|at| metric.label_values[at].clone()).unwrap_or_default()
    };
    let find = |name: &str| {
        let found = own.metrics.iter().chain(&of_container.metrics).find(|metric| metric.name == name);
        found.and_then(|metric| metric.value).map(|value| value.value).unwrap_or(u64::MAX)
    };
    let status = container.status().await?;
    let name = status.metadata.clone().unwrap_or_default().name;
    let metadata = pod.config.metadata.clone().unwrap_or_default();
    for metric in &of_container.metrics {
        ensure!(label(metric, "container") == name && label(metric, "pod") == metadata.name, "{metric:?}");
        ensure!(label(metric, "namespace") == "e2e" && label(metric, "id") == container.id, "{metric:?}");
    }
    for (name, expected) in [
        ("container_spec_memory_limit_bytes", LIMIT),
        ("container_spec_cpu_quota", 90_000),
        ("container_spec_cpu_period", 100_000),
        ("container_spec_cpu_shares", 1024),
        ("container_memory_swap", 0),
        ("container_oom_events_total", 0),
        ("container_threads_max", 0),
        ("container_start_time_seconds", status.started_at as u64 / 1_000_000_000),
    ] {
        ensure!(find(name) == expected, "{name} is {}", find(name));
    }
    // The shell, nc and sleep; the socket is that of nc.
    ensure!((2..=4).contains(&find("container_processes")), "{} processes", find("container_processes"));
    ensure!(find("container_threads") >= find("container_processes"));
    ensure!((1..10).contains(&find("container_sockets")), "{} sockets", find("container_sockets"));
    ensure!((6..60).contains(&find("container_file_descriptors")));
    let limit: u64 = container.sh("ulimit -n").await?.trim().parse()?;
    ensure!(find("container_ulimits_soft") == limit);
    ensure!((3 << 20..4 << 20).contains(&find("container_fs_usage_bytes")));
    ensure!(
        find("container_fs_limit_bytes") > 3 << 20
            && find("container_fs_inodes_free") < find("container_fs_inodes_total")
    );
    ensure!(find("container_fs_writes_bytes_total") >= 3 << 20, "what is synced is written");
    ensure!(find("container_network_transmit_packets_total") > 0);

    let mut stream = runtime.stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest {}).await?.into_inner();
    let streamed = stream.message().await?.context("no message")?.pod_sandbox_metrics;
    ensure!(streamed.iter().any(|it| it.pod_sandbox_id == pod.id));
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_guest_that_hangs_costs_the_others_nothing_but_a_moment() -> anyhow::Result<()> {
    let good = TestPod::run("quick").await?;
    let hung = TestPod::run("hung").await?;
    let (container, other) = (good.start(shell("a", "sleep 1000")).await?, hung.start(shell("b", "sleep 1000")).await?);
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: hung.id.clone(), verbose: true };
    let status = good.cri.runtime.clone().pod_sandbox_status(request).await?.into_inner();
    ensure!(status.containers_statuses.iter().any(|it| it.id == other.id) && status.timestamp > 0);
    let info: serde_json::Value = serde_json::from_str(&status.info["info"])?;
    let pid = info["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32)).context("no pid of the VMM")?;

    kill_process(pid, Signal::STOP)?;
    let start = Instant::now();
    let request = cri::ListContainerStatsRequest::default();
    let listed = good.cri.runtime.clone().list_container_stats(request).await;
    let took = start.elapsed();
    let single = stats(&good.cri, &other.id).await;
    kill_process(pid, Signal::CONT)?;
    let listed: Vec<String> =
        listed?.into_inner().stats.into_iter().filter_map(|it| it.attributes).map(|it| it.id).collect();
    ensure!(listed.contains(&container.id) && !listed.contains(&other.id), "{listed:?}");
    ensure!(took < Duration::from_secs(20), "{took:?}");
    ensure!(single.err().map(|error| error.code()) == Some(Code::DeadlineExceeded));
    ensure!(stats(&good.cri, &other.id).await?.cpu.is_some(), "it answers again");
    good.remove().await?;
    hung.remove().await?;
    Ok(())
}
