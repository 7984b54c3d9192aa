//! The counters of a guest as CRI's statistics. What the guest does not know is absent. The guest is hostile: its numbers are
//! passed on, its texts are cut and cleaned, its lists are bounded.

use std::path::Path;
use std::sync::Arc;

use isopod_proto::agent::{CgroupStats, ContainerStats, InterfaceStats, Pressure, Stall, StatsResponse};

use crate::container::ContainerRecord;
use crate::cri;
use crate::sandbox::SandboxRecord;

/// Most network interfaces and block devices that are shown of a guest.
pub const MAX_DEVICES: usize = 64;
/// Longest name of one of them.
const MAX_NAME: usize = 64;
/// The interface that the pod's address is on.
const DEFAULT_INTERFACE: &str = "eth0";

/// A name that the guest gave: printable and short.
pub fn name(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).take(MAX_NAME).collect()
}

fn value(value: Option<u64>) -> Option<cri::UInt64Value> {
    value.map(|value| cri::UInt64Value { value })
}

/// A guest's counters of the container, if it has them.
pub fn of<'a>(record: &ContainerRecord, guest: &'a StatsResponse) -> Option<&'a ContainerStats> {
    guest.containers.iter().find(|counters| counters.id == record.id.as_str())
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

/// The statistics of those of `records` that the guest knows. Scratch disks are below `root`.
pub fn containers(records: &[Arc<ContainerRecord>], guest: &StatsResponse, root: &Path) -> Vec<cri::ContainerStats> {
    records.iter().filter_map(|record| Some(container(record, of(record, guest)?, root))).collect()
}

fn container(record: &ContainerRecord, counters: &ContainerStats, root: &Path) -> cri::ContainerStats {
    let timestamp = counters.timestamp_nanos;
    let cgroup = counters.cgroup.clone().unwrap_or_default();
    let writable_layer = cri::FilesystemUsage {
        timestamp,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: root.display().to_string() }),
        used_bytes: value(counters.writable_layer_bytes),
        inodes_used: value(counters.writable_layer_inodes),
    };
    cri::ContainerStats {
        cpu: Some(cpu(&cgroup, timestamp)),
        memory: Some(memory(&cgroup, timestamp, None)),
        writable_layer: Some(writable_layer),
        swap: swap(&cgroup, timestamp),
        io: io(&cgroup, timestamp),
        ..without_counters(record)
    }
}

/// The statistics of a sandbox, with those of its containers.
pub fn pod(
    record: &SandboxRecord,
    guest: &StatsResponse,
    containers: Vec<cri::ContainerStats>,
) -> cri::PodSandboxStats {
    let timestamp = guest.timestamp_nanos;
    let cgroup = guest.pod.clone().unwrap_or_default();
    // A pod without a limit of its own may use what its VM has.
    let available = (guest.memory_available_bytes > 0).then_some(guest.memory_available_bytes);
    let interfaces: Vec<_> = guest.interfaces.iter().take(MAX_DEVICES).map(interface).collect();
    let default = interfaces.iter().find(|interface| interface.name == DEFAULT_INTERFACE).or(interfaces.first());
    let network = cri::NetworkUsage { timestamp, default_interface: default.cloned(), interfaces: interfaces.clone() };
    let process = cri::ProcessUsage { timestamp, process_count: value(cgroup.processes) };
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: record.id.to_string(),
            metadata: record.config.metadata.clone(),
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: Some(cpu(&cgroup, timestamp)),
            memory: Some(memory(&cgroup, timestamp, available)),
            network: Some(network),
            process: cgroup.processes.map(|_| process),
            containers,
            io: io(&cgroup, timestamp),
        }),
    }
}

fn interface(interface: &InterfaceStats) -> cri::NetworkInterfaceUsage {
    cri::NetworkInterfaceUsage {
        name: name(&interface.name),
        rx_bytes: value(Some(interface.rx_bytes)),
        rx_errors: value(Some(interface.rx_errors)),
        tx_bytes: value(Some(interface.tx_bytes)),
        tx_errors: value(Some(interface.tx_errors)),
    }
}

fn cpu(cgroup: &CgroupStats, timestamp: i64) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(cgroup.cpu_usage_micros.map(|micros| micros.saturating_mul(1000))),
        usage_nano_cores: value(cgroup.cpu_nano_cores),
        psi: psi(cgroup.cpu_pressure),
    }
}

/// `unlimited`: what is available to a cgroup that has no limit, if that is known.
fn memory(cgroup: &CgroupStats, timestamp: i64, unlimited: Option<u64>) -> cri::MemoryUsage {
    let limit = cgroup.memory_limit_bytes.and_then(|limit| u64::try_from(limit).ok());
    let left = limit.zip(cgroup.memory_working_set_bytes).map(|(limit, used)| limit.saturating_sub(used));
    cri::MemoryUsage {
        timestamp,
        working_set_bytes: value(cgroup.memory_working_set_bytes),
        available_bytes: value(if limit.is_some() { left } else { unlimited }),
        usage_bytes: value(cgroup.memory_usage_bytes),
        rss_bytes: value(cgroup.memory_anon_bytes),
        page_faults: value(cgroup.page_faults),
        major_page_faults: value(cgroup.major_page_faults),
        psi: psi(cgroup.memory_pressure),
    }
}

fn swap(cgroup: &CgroupStats, timestamp: i64) -> Option<cri::SwapUsage> {
    let usage = cgroup.swap_usage_bytes?;
    let limit = cgroup.swap_limit_bytes.and_then(|limit| u64::try_from(limit).ok());
    Some(cri::SwapUsage {
        timestamp,
        swap_available_bytes: value(limit.map(|limit| limit.saturating_sub(usage))),
        swap_usage_bytes: value(Some(usage)),
    })
}

fn io(cgroup: &CgroupStats, timestamp: i64) -> Option<cri::IoUsage> {
    psi(cgroup.io_pressure).map(|psi| cri::IoUsage { timestamp, psi: Some(psi) })
}

/// CRI has no way to say that one of the two is not known, as at the CPU of a whole machine; there it is 0 in the kernel, too.
fn psi(pressure: Option<Pressure>) -> Option<cri::PsiStats> {
    let Pressure { some, full } = pressure?;
    Some(cri::PsiStats { some: Some(stall(&some?)?), full: full.and_then(|full| stall(&full)) })
}

/// The kernel counts in microseconds, CRI in nanoseconds, as cAdvisor.
fn stall(stall: &Stall) -> Option<cri::PsiData> {
    let share = |share: f64| (0.0..=100.0).contains(&share).then_some(share);
    Some(cri::PsiData {
        total: stall.total_micros.saturating_mul(1000),
        avg10: share(stall.avg10)?,
        avg60: share(stall.avg60)?,
        avg300: share(stall.avg300)?,
    })
}

#[cfg(test)]
mod tests {
    use isopod_proto::ObjectId;

    use super::*;

    fn record() -> Arc<ContainerRecord> {
        Arc::new(ContainerRecord::for_tests(ObjectId::from_random([0xab; 32]), ObjectId::from_random([0xcd; 32])))
    }

    fn guest(cgroup: CgroupStats) -> StatsResponse {
        let id = record().id.to_string();
        let counters = ContainerStats { id, timestamp_nanos: 7, cgroup: Some(cgroup), ..Default::default() };
        StatsResponse { containers: vec![counters], ..Default::default() }
    }

    #[test]
    fn what_the_guest_does_not_know_is_absent_and_not_zero() {
        let guest = guest(CgroupStats { cpu_usage_micros: Some(3), ..Default::default() });
        let shown = containers(&[record()], &guest, Path::new("/x")).pop().expect("one");
        let cpu = shown.cpu.expect("given");
        assert_eq!(cpu.usage_core_nano_seconds, Some(cri::UInt64Value { value: 3000 }));
        assert_eq!((cpu.usage_nano_cores, cpu.psi), (None, None));
        let memory = shown.memory.expect("given");
        assert_eq!((memory.working_set_bytes, memory.available_bytes), (None, None));
        assert_eq!((shown.swap, shown.io), (None, None));
        assert_eq!(shown.writable_layer.expect("given").used_bytes, None);
    }

    #[test]
    fn memory_is_available_below_the_limit() {
        let cgroup = |limit| CgroupStats {
            memory_working_set_bytes: Some(30),
            memory_limit_bytes: Some(limit),
            ..Default::default()
        };
        let available = |limit, unlimited| memory(&cgroup(limit), 1, unlimited).available_bytes.map(|it| it.value);
        assert_eq!(available(100, Some(5)), Some(70));
        assert_eq!(available(20, Some(5)), Some(0));
        assert_eq!(available(-1, Some(5)), Some(5));
        assert_eq!(available(-1, None), None);
    }

    #[test]
    fn a_share_that_is_none_is_not_passed_on() {
        let stall = |avg10| Stall { total_micros: 1, avg10, avg60: 0.0, avg300: 0.0 };
        let pressure = |avg10| Pressure { some: Some(stall(avg10)), full: None };
        assert_eq!(psi(Some(pressure(1.5))).expect("given").some.expect("given").total, 1000);
        for bad in [f64::NAN, f64::INFINITY, -1.0, 101.0] {
            assert_eq!(psi(Some(pressure(bad))), None);
        }
    }

    #[test]
    fn names_and_lists_of_a_guest_are_bounded() {
        assert_eq!(name("eth0\u{1b}[31m \n\u{202e}x"), "eth0[31mx");
        assert_eq!(name(&"x".repeat(1000)).len(), 64);
        let interfaces = vec![InterfaceStats { name: "x".into(), ..Default::default() }; 1000];
        let sandbox = SandboxRecord::for_tests(ObjectId::from_random([1; 32]));
        let stats = pod(&sandbox, &StatsResponse { interfaces, ..Default::default() }, Vec::new());
        assert_eq!(stats.linux.expect("given").network.expect("given").interfaces.len(), 64);
    }
}
