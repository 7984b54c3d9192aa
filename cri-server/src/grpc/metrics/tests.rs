use std::collections::BTreeSet;

use isopod_proto::ObjectId;
use isopod_proto::agent::{
    BlockDeviceStats, CgroupStats, ContainerStats, FilesystemStats, HugePageStats, InterfaceStats, Pressure, Stall,
};

use super::*;
use crate::cri::MetricType;

/// What critest demands samples of (cri-tools `pkg/validate/pod.go`), and what it lets a runtime leave out.
const DEMANDED: &str = "cpu_cfs_periods_total cpu_cfs_throttled_periods_total cpu_cfs_throttled_seconds_total \
    cpu_system_seconds_total cpu_usage_seconds_total cpu_user_seconds_total file_descriptors fs_inodes_free \
    fs_inodes_total fs_limit_bytes fs_usage_bytes last_seen memory_cache memory_failcnt memory_failures_total \
    memory_kernel_usage memory_mapped_file memory_max_usage_bytes memory_rss memory_swap memory_usage_bytes \
    memory_working_set_bytes network_receive_bytes_total network_receive_errors_total \
    network_receive_packets_dropped_total network_receive_packets_total network_transmit_bytes_total \
    network_transmit_errors_total network_transmit_packets_dropped_total network_transmit_packets_total \
    oom_events_total processes sockets spec_cpu_period spec_cpu_shares spec_memory_limit_bytes \
    spec_memory_swap_limit_bytes start_time_seconds threads threads_max";
const OPTIONAL: &str = "blkio_device_usage_total fs_reads_bytes_total fs_reads_total fs_writes_bytes_total \
    fs_writes_total hugetlb_usage_bytes pressure_cpu_stalled_seconds_total pressure_cpu_waiting_seconds_total \
    pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total pressure_memory_stalled_seconds_total \
    pressure_memory_waiting_seconds_total spec_cpu_quota spec_memory_reservation_limit_bytes ulimits_soft";

fn names(list: &str) -> BTreeSet<String> {
    list.split_whitespace().map(|name| format!("container_{name}")).collect()
}

fn pod() -> (SandboxRecord, Arc<ContainerRecord>) {
    let mut sandbox = SandboxRecord::for_tests(ObjectId::from_random([1; 32]));
    sandbox.config.metadata =
        Some(cri::PodSandboxMetadata { name: "web".into(), namespace: "shop".into(), ..Default::default() });
    let mut container = ContainerRecord::for_tests(ObjectId::from_random([2; 32]), sandbox.id.clone());
    container.config.metadata = Some(cri::ContainerMetadata { name: "nginx".into(), attempt: 0 });
    container.state = crate::container::ContainerState::Running { started_at: 5_500_000_000 };
    (sandbox, Arc::new(container))
}

/// A guest that knows everything.
fn guest(container: &ContainerRecord) -> StatsResponse {
    let stall = |total_micros| Some(Stall { total_micros, ..Default::default() });
    let pressure = Some(Pressure { some: stall(7_000_000), full: stall(3_000_000) });
    let cgroup = CgroupStats {
        cpu_usage_micros: Some(3_900_000),
        cpu_user_micros: Some(1),
        cpu_system_micros: Some(1),
        cpu_periods: Some(1),
        cpu_throttled_periods: Some(1),
        cpu_throttled_micros: Some(1),
        cpu_weight: Some(39),
        cpu_quota_micros: Some(20_000),
        cpu_period_micros: Some(100_000),
        cpu_pressure: pressure,
        memory_usage_bytes: Some(1),
        memory_peak_bytes: Some(1),
        memory_working_set_bytes: Some(1),
        memory_anon_bytes: Some(1),
        memory_file_bytes: Some(1),
        memory_mapped_bytes: Some(1),
        memory_kernel_bytes: Some(1),
        page_faults: Some(8),
        major_page_faults: Some(1),
        memory_limit_hits: Some(1),
        oom_kills: Some(1),
        memory_limit_bytes: Some(64 << 20),
        memory_low_bytes: Some(0),
        swap_usage_bytes: Some(0),
        swap_limit_bytes: Some(0),
        memory_pressure: pressure,
        threads: Some(4),
        threads_limit: Some(-1),
        processes: Some(2),
        devices: vec![BlockDeviceStats { major: 254, name: "vda".into(), written_bytes: 9, ..Default::default() }],
        io_pressure: pressure,
        huge_pages: vec![HugePageStats { size: "2MB".into(), usage_bytes: 0 }],
        cpu_nano_cores: None,
    };
    let counters = ContainerStats {
        id: container.id.to_string(),
        timestamp_nanos: 9_900_000_000,
        writable_layer_bytes: Some(4096),
        writable_layer_inodes: Some(2),
        cgroup: Some(cgroup),
        file_descriptors: Some(5),
        sockets: Some(1),
        open_files_soft_limit: Some(1024),
        filesystem: Some(FilesystemStats { device: "vda".into(), total_bytes: 1 << 30, ..Default::default() }),
    };
    let interfaces = vec![InterfaceStats { name: "eth0".into(), rx_bytes: 77, ..Default::default() }];
    StatsResponse { containers: vec![counters], interfaces, timestamp_nanos: 9_000_000_000, ..Default::default() }
}

fn all(metrics: &cri::PodSandboxMetrics) -> impl Iterator<Item = &cri::Metric> {
    metrics.metrics.iter().chain(metrics.container_metrics.iter().flat_map(|container| &container.metrics))
}

fn value(metrics: &cri::PodSandboxMetrics, name: &str) -> Option<u64> {
    all(metrics).find(|metric| metric.name == name).and_then(|metric| metric.value).map(|value| value.value)
}

#[test]
fn every_metric_that_is_asked_for_is_described_once() {
    let descriptors = descriptors();
    let described: BTreeSet<String> = descriptors.iter().map(|descriptor| descriptor.name.clone()).collect();
    assert_eq!(described.len(), descriptors.len());
    assert_eq!(described, names(&format!("{DEMANDED} {OPTIONAL}")));
    assert!(descriptors.iter().all(|descriptor| !descriptor.help.is_empty()));
}

#[test]
fn every_metric_has_a_value_for_each_of_its_labels() {
    let (sandbox, container) = pod();
    let metrics = of_pod(&sandbox, &[Arc::clone(&container)], &guest(&container));
    for descriptor in descriptors() {
        let samples: Vec<_> = all(&metrics).filter(|metric| metric.name == descriptor.name).collect();
        assert!(!samples.is_empty(), "{} has no sample", descriptor.name);
        for sample in samples {
            assert_eq!(sample.label_values.len(), descriptor.label_keys.len(), "{}", descriptor.name);
            assert!(sample.timestamp > 0 && sample.value.is_some());
            // Inodes come and go, whatever the name says.
            let counts = descriptor.name.ends_with("_total") && descriptor.name != "container_fs_inodes_total";
            assert_eq!(sample.metric_type() == MetricType::Counter, counts || descriptor.name.ends_with("failcnt"));
        }
    }
}

#[test]
fn values_are_in_the_units_of_their_names() {
    let (sandbox, container) = pod();
    let metrics = of_pod(&sandbox, &[Arc::clone(&container)], &guest(&container));
    for (name, expected) in [
        ("container_cpu_usage_seconds_total", 3),
        ("container_pressure_io_waiting_seconds_total", 7),
        ("container_pressure_io_stalled_seconds_total", 3),
        ("container_start_time_seconds", 5),
        ("container_last_seen", 9),
        ("container_spec_memory_limit_bytes", 64 << 20),
        ("container_threads_max", 0),
        ("container_network_receive_bytes_total", 77),
        ("container_fs_usage_bytes", 4096),
    ] {
        assert_eq!(value(&metrics, name), Some(expected), "{name}");
    }
    // The weight is what 1024 shares become.
    let shares = value(&metrics, "container_spec_cpu_shares").expect("known");
    assert!((990..=1024).contains(&shares), "{shares}");
    let received = metrics.metrics.iter().find(|metric| metric.name.ends_with("receive_bytes_total")).expect("one");
    assert_eq!(received.label_values[1..], ["web", "", "POD", "web", "shop", "eth0"]);
}

#[test]
fn what_is_not_known_has_no_sample() {
    let (sandbox, container) = pod();
    let counters = ContainerStats { id: container.id.to_string(), timestamp_nanos: 1, ..Default::default() };
    let guest = StatsResponse { containers: vec![counters], ..Default::default() };
    let metrics = of_pod(&sandbox, &[container], &guest);
    let known: Vec<&str> = all(&metrics).map(|metric| metric.name.as_str()).collect();
    assert_eq!(known, ["container_last_seen", "container_start_time_seconds"]);
}
