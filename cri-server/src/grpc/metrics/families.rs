//! Each metric: its name, its help, its labels, and where its values are.

use isopod_proto::agent::{
    BlockDeviceStats, CgroupStats, ContainerStats, FilesystemStats, InterfaceStats, StatsResponse,
};
use isopod_proto::agent::{Pressure, Stall};

use crate::container::ContainerRecord;
use crate::cri::MetricType::{self, Counter, Gauge};
use crate::grpc::counters::{MAX_DEVICES, name};

/// Values, each with those of its labels that its family has beyond the common ones.
pub type Samples = Vec<(Vec<String>, u64)>;

/// A metric.
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// What it means.
    pub help: &'static str,
    /// Whether it only ever grows.
    pub kind: MetricType,
    /// Its labels beyond the common ones.
    pub labels: &'static [&'static str],
    /// Its values.
    pub of: Of,
}

/// What a metric is about.
#[derive(Clone, Copy)]
pub enum Of {
    /// A container.
    Container(fn(&Source<'_>) -> Samples),
    /// The pod.
    Pod(fn(&StatsResponse) -> Samples),
}

/// Where the values of a container's metrics come from.
pub struct Source<'a> {
    /// What the daemon knows.
    pub record: &'a ContainerRecord,
    /// What the guest knows.
    pub counters: &'a ContainerStats,
    cgroup: CgroupStats,
}

impl<'a> Source<'a> {
    /// Of one container.
    pub fn new(record: &'a ContainerRecord, counters: &'a ContainerStats) -> Self {
        Self { record, counters, cgroup: counters.cgroup.clone().unwrap_or_default() }
    }

    /// The limits that the container was asked to have.
    fn limits(&self) -> crate::cri::LinuxContainerResources {
        self.record.config.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default()
    }
}

const fn container(
    name: &'static str,
    kind: MetricType,
    help: &'static str,
    labels: &'static [&'static str],
    of: fn(&Source<'_>) -> Samples,
) -> Family {
    Family { name, help, kind, labels, of: Of::Container(of) }
}

const fn network(name: &'static str, help: &'static str, of: fn(&StatsResponse) -> Samples) -> Family {
    Family { name, help, kind: Counter, labels: &["interface"], of: Of::Pod(of) }
}

fn one(value: Option<u64>) -> Samples {
    value.map(|value| (Vec::new(), value)).into_iter().collect()
}

fn labelled(label: &str, value: Option<u64>) -> Samples {
    value.map(|value| (vec![label.to_owned()], value)).into_iter().collect()
}

/// Whole seconds.
fn seconds(micros: Option<u64>) -> Samples {
    one(micros.map(|micros| micros / 1_000_000))
}

/// A limit; cAdvisor shows none as 0.
fn limit(limit: Option<i64>) -> Samples {
    one(limit.map(|limit| u64::try_from(limit).unwrap_or(0)))
}

fn stalled(pressure: Option<Pressure>, which: fn(&Pressure) -> Option<Stall>) -> Samples {
    seconds(pressure.as_ref().and_then(which).map(|stall| stall.total_micros))
}

fn disk(source: &Source<'_>, of: fn(&FilesystemStats) -> u64) -> Samples {
    source.counters.filesystem.iter().map(|disk| (vec![name(&disk.device)], of(disk))).collect()
}

fn devices(source: &Source<'_>, of: fn(&BlockDeviceStats) -> u64) -> Samples {
    let devices = source.cgroup.devices.iter().take(MAX_DEVICES);
    devices.map(|device| (vec![name(&device.name)], of(device))).collect()
}

fn interfaces(guest: &StatsResponse, of: fn(&InterfaceStats) -> u64) -> Samples {
    let interfaces = guest.interfaces.iter().take(MAX_DEVICES);
    interfaces.map(|interface| (vec![name(&interface.name)], of(interface))).collect()
}

fn device_usage(source: &Source<'_>) -> Samples {
    let of = |device: &BlockDeviceStats| {
        let labels = |operation: &str| {
            vec![name(&device.name), device.major.to_string(), device.minor.to_string(), operation.to_owned()]
        };
        [(labels("Read"), device.read_bytes), (labels("Write"), device.written_bytes)]
    };
    source.cgroup.devices.iter().take(MAX_DEVICES).flat_map(of).collect()
}

/// The memory controller counts a container with all that it has below it, so both scopes of cAdvisor are the same.
fn memory_failures(source: &Source<'_>) -> Samples {
    let cgroup = &source.cgroup;
    let mut samples = Samples::new();
    for (kind, value) in [("pgfault", cgroup.page_faults), ("pgmajfault", cgroup.major_page_faults)] {
        for scope in ["container", "hierarchy"] {
            samples.extend(value.map(|value| (vec![kind.to_owned(), scope.to_owned()], value)));
        }
    }
    samples
}

/// What was asked for, or else the weight in force, turned back into shares (KEP-2254).
fn cpu_shares(source: &Source<'_>) -> Samples {
    let in_force =
        || source.cgroup.cpu_weight.map(|weight| 2 + weight.saturating_sub(1).saturating_mul(262_142) / 9999);
    one(u64::try_from(source.limits().cpu_shares).ok().filter(|shares| *shares > 0).or_else(in_force))
}

/// What is not limited has no quota.
fn cpu_quota(source: &Source<'_>) -> Samples {
    one(source.cgroup.cpu_quota_micros.and_then(|quota| u64::try_from(quota).ok()))
}

fn start_time(source: &Source<'_>) -> Samples {
    one(u64::try_from(source.record.state.started_at() / 1_000_000_000).ok())
}

fn last_seen(source: &Source<'_>) -> Samples {
    one(u64::try_from(source.counters.timestamp_nanos / 1_000_000_000).ok())
}

fn huge_pages(source: &Source<'_>) -> Samples {
    source
        .cgroup
        .huge_pages
        .iter()
        .take(MAX_DEVICES)
        .map(|pages| (vec![name(&pages.size)], pages.usage_bytes))
        .collect()
}

const DEVICE: &[&str] = &["device"];

/// The names are those that the kubelet's users know from cAdvisor; critest asks for all of them.
/// `container_hugetlb_max_usage_bytes` is not among them: cgroup v2 does not keep that value.
pub const FAMILIES: &[Family] = &[
    container(
        "container_blkio_device_usage_total",
        Counter,
        "Bytes read from and written to a block device",
        &["device", "major", "minor", "operation"],
        device_usage,
    ),
    container("container_cpu_cfs_periods_total", Counter, "Elapsed enforcement periods of the CPU limit", &[], |it| {
        one(it.cgroup.cpu_periods)
    }),
    container(
        "container_cpu_cfs_throttled_periods_total",
        Counter,
        "Periods in which the container was throttled",
        &[],
        |it| one(it.cgroup.cpu_throttled_periods),
    ),
    container(
        "container_cpu_cfs_throttled_seconds_total",
        Counter,
        "Time for which the container was throttled",
        &[],
        |it| seconds(it.cgroup.cpu_throttled_micros),
    ),
    container("container_cpu_system_seconds_total", Counter, "CPU time spent in the kernel", &[], |it| {
        seconds(it.cgroup.cpu_system_micros)
    }),
    container("container_cpu_usage_seconds_total", Counter, "CPU time", &["cpu"], |it| {
        labelled("total", it.cgroup.cpu_usage_micros.map(|micros| micros / 1_000_000))
    }),
    container("container_cpu_user_seconds_total", Counter, "CPU time spent in user mode", &[], |it| {
        seconds(it.cgroup.cpu_user_micros)
    }),
    container("container_file_descriptors", Gauge, "Open file descriptors", &[], |it| {
        one(it.counters.file_descriptors)
    }),
    container("container_fs_inodes_free", Gauge, "Free inodes of the writable layer's file system", DEVICE, |it| {
        disk(it, |disk| disk.inodes_free)
    }),
    container("container_fs_inodes_total", Gauge, "Inodes of the writable layer's file system", DEVICE, |it| {
        disk(it, |disk| disk.inodes_total)
    }),
    container("container_fs_limit_bytes", Gauge, "Size of the writable layer's file system", DEVICE, |it| {
        disk(it, |disk| disk.total_bytes)
    }),
    container("container_fs_reads_bytes_total", Counter, "Bytes read from block devices", DEVICE, |it| {
        devices(it, |device| device.read_bytes)
    }),
    container("container_fs_reads_total", Counter, "Reads from block devices", DEVICE, |it| {
        devices(it, |device| device.reads)
    }),
    container("container_fs_usage_bytes", Gauge, "Bytes that the writable layer takes", DEVICE, |it| {
        let device = it.counters.filesystem.as_ref().map(|disk| name(&disk.device)).unwrap_or_default();
        labelled(&device, it.counters.writable_layer_bytes)
    }),
    container("container_fs_writes_bytes_total", Counter, "Bytes written to block devices", DEVICE, |it| {
        devices(it, |device| device.written_bytes)
    }),
    container("container_fs_writes_total", Counter, "Writes to block devices", DEVICE, |it| {
        devices(it, |device| device.writes)
    }),
    container("container_hugetlb_usage_bytes", Gauge, "Huge pages in use", &["pagesize"], huge_pages),
    container(
        "container_last_seen",
        Gauge,
        "When the container was last seen, in seconds since the epoch",
        &[],
        last_seen,
    ),
    container("container_memory_cache", Gauge, "Bytes of page cache", &[], |it| one(it.cgroup.memory_file_bytes)),
    container("container_memory_failcnt", Counter, "How often the memory limit was hit", &[], |it| {
        one(it.cgroup.memory_limit_hits)
    }),
    container("container_memory_failures_total", Counter, "Page faults", &["failure_type", "scope"], memory_failures),
    container("container_memory_kernel_usage", Gauge, "Bytes of kernel memory", &[], |it| {
        one(it.cgroup.memory_kernel_bytes)
    }),
    container("container_memory_mapped_file", Gauge, "Bytes of mapped files", &[], |it| {
        one(it.cgroup.memory_mapped_bytes)
    }),
    container("container_memory_max_usage_bytes", Gauge, "Most bytes of memory that were in use", &[], |it| {
        one(it.cgroup.memory_peak_bytes)
    }),
    container("container_memory_rss", Gauge, "Bytes of anonymous memory", &[], |it| one(it.cgroup.memory_anon_bytes)),
    container("container_memory_swap", Gauge, "Bytes of swap in use", &[], |it| one(it.cgroup.swap_usage_bytes)),
    container("container_memory_usage_bytes", Gauge, "Bytes of memory in use, page cache included", &[], |it| {
        one(it.cgroup.memory_usage_bytes)
    }),
    container(
        "container_memory_working_set_bytes",
        Gauge,
        "Bytes of memory in use without inactive page cache",
        &[],
        |it| one(it.cgroup.memory_working_set_bytes),
    ),
    network("container_network_receive_bytes_total", "Bytes received", |it| interfaces(it, |it| it.rx_bytes)),
    network("container_network_receive_errors_total", "Errors while receiving", |it| interfaces(it, |it| it.rx_errors)),
    network("container_network_receive_packets_dropped_total", "Packets dropped while receiving", |it| {
        interfaces(it, |it| it.rx_dropped)
    }),
    network("container_network_receive_packets_total", "Packets received", |it| interfaces(it, |it| it.rx_packets)),
    network("container_network_transmit_bytes_total", "Bytes sent", |it| interfaces(it, |it| it.tx_bytes)),
    network("container_network_transmit_errors_total", "Errors while sending", |it| interfaces(it, |it| it.tx_errors)),
    network("container_network_transmit_packets_dropped_total", "Packets dropped while sending", |it| {
        interfaces(it, |it| it.tx_dropped)
    }),
    network("container_network_transmit_packets_total", "Packets sent", |it| interfaces(it, |it| it.tx_packets)),
    container("container_oom_events_total", Counter, "Processes killed for want of memory", &[], |it| {
        one(it.cgroup.oom_kills)
    }),
    container(
        "container_pressure_cpu_stalled_seconds_total",
        Counter,
        "Time in which no process could run",
        &[],
        |it| stalled(it.cgroup.cpu_pressure, |it| it.full),
    ),
    container(
        "container_pressure_cpu_waiting_seconds_total",
        Counter,
        "Time in which a process waited for a CPU",
        &[],
        |it| stalled(it.cgroup.cpu_pressure, |it| it.some),
    ),
    container(
        "container_pressure_io_stalled_seconds_total",
        Counter,
        "Time in which all processes waited for I/O",
        &[],
        |it| stalled(it.cgroup.io_pressure, |it| it.full),
    ),
    container(
        "container_pressure_io_waiting_seconds_total",
        Counter,
        "Time in which a process waited for I/O",
        &[],
        |it| stalled(it.cgroup.io_pressure, |it| it.some),
    ),
    container(
        "container_pressure_memory_stalled_seconds_total",
        Counter,
        "Time in which all processes waited for memory",
        &[],
        |it| stalled(it.cgroup.memory_pressure, |it| it.full),
    ),
    container(
        "container_pressure_memory_waiting_seconds_total",
        Counter,
        "Time in which a process waited for memory",
        &[],
        |it| stalled(it.cgroup.memory_pressure, |it| it.some),
    ),
    container("container_processes", Gauge, "Processes", &[], |it| one(it.cgroup.processes)),
    container("container_sockets", Gauge, "Open sockets", &[], |it| one(it.counters.sockets)),
    container("container_spec_cpu_period", Gauge, "Enforcement period of the CPU limit, in microseconds", &[], |it| {
        one(it.cgroup.cpu_period_micros)
    }),
    container("container_spec_cpu_quota", Gauge, "CPU time allowed in a period, in microseconds", &[], cpu_quota),
    container("container_spec_cpu_shares", Gauge, "CPU shares", &[], cpu_shares),
    container("container_spec_memory_limit_bytes", Gauge, "Memory limit; 0 is none", &[], |it| {
        limit(it.cgroup.memory_limit_bytes)
    }),
    container("container_spec_memory_reservation_limit_bytes", Gauge, "Memory that is not reclaimed", &[], |it| {
        limit(it.cgroup.memory_low_bytes)
    }),
    container("container_spec_memory_swap_limit_bytes", Gauge, "Swap that may be used", &[], |it| {
        limit(it.cgroup.swap_limit_bytes)
    }),
    container(
        "container_start_time_seconds",
        Gauge,
        "When the container started, in seconds since the epoch",
        &[],
        start_time,
    ),
    container("container_threads", Gauge, "Threads", &[], |it| one(it.cgroup.threads)),
    container("container_threads_max", Gauge, "Most threads there may be; 0 is no limit", &[], |it| {
        limit(it.cgroup.threads_limit)
    }),
    container("container_ulimits_soft", Gauge, "Soft limits of the first process", &["ulimit"], |it| {
        labelled("max_open_files", it.counters.open_files_soft_limit)
    }),
];
