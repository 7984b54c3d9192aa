//! How large a sandbox's VM is to be.

use serde::{Deserialize, Serialize};

use crate::config::VmmConfig;
use crate::cri;

const MIB: u64 = 1024 * 1024;
/// What the guest's kernel, agent and caches take of a VM made for a memory limit, and in it the kernel's record of each page: 64
/// bytes for 4096.
const GUEST_OVERHEAD: u64 = 64 * MIB;
const PAGE_RECORDS: u64 = 64;
/// vCPUs that a VM can be resized to where nothing else is configured.
const MOST_VCPUS: u32 = 8;
/// The most memory that a VMM gives to a VM.
const MOST_MEMORY: u64 = 4 << 40;
/// Smallest VM.
const LEAST: u64 = 128 * MIB;
/// Memory is given in steps of this.
const STEP: u64 = 2 * MIB;

/// A VM's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// 1 to 64.
    pub vcpus: u32,
    /// A multiple of 2 MiB.
    pub memory_bytes: u64,
}

impl Size {
    /// All of the host, and more vCPUs than it has CPUs where that is configured.
    pub fn of_host(config: &VmmConfig) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
        let info = rustix::system::sysinfo();
        let memory_bytes = info.totalram.saturating_mul(info.mem_unit.into());
        Self { vcpus: cpus.max(config.max_vcpus.unwrap_or(0)), memory_bytes }
    }

    /// The larger one of both, in each respect.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let (vcpus, memory_bytes) = (self.vcpus.max(other.vcpus), self.memory_bytes.max(other.memory_bytes));
        Self { vcpus, memory_bytes }
    }
}

/// The size for a pod: from its limits, and where it has none the configured one. `host` bounds the vCPUs.
pub fn of(pod: Option<&cri::LinuxPodSandboxConfig>, config: &VmmConfig, host: Size) -> Size {
    let resources = pod.and_then(|pod| pod.resources.clone()).unwrap_or_default();
    let overhead = pod.and_then(|pod| pod.overhead.clone()).unwrap_or_default();
    let memory_bytes = match natural(resources.memory_limit_in_bytes) {
        0 => config.memory_bytes,
        limit => memory_for(limit.saturating_add(natural(overhead.memory_limit_in_bytes))),
    };
    let vcpus = match cpus([&resources].into_iter()) {
        0 => config.vcpus,
        limit => limit.min(host.vcpus.max(1)),
    };
    Size { vcpus: vcpus.clamp(1, 64), memory_bytes }
}

/// The size in which all containers can have what their limits allow them, as far as they have limits.
pub fn of_containers<'a>(limits: impl Iterator<Item = &'a cri::LinuxContainerResources> + Clone, host: Size) -> Size {
    let memory = limits.clone().map(|limits| natural(limits.memory_limit_in_bytes)).fold(0, u64::saturating_add);
    let memory_bytes = if memory == 0 { 0 } else { memory_for(memory) };
    Size { vcpus: cpus(limits).min(host.vcpus), memory_bytes }
}

/// The largest size that a VM that is made with `made` can be resized to.
pub fn largest(made: Size, config: &VmmConfig, host: Size) -> Size {
    let vcpus = config.max_vcpus.unwrap_or_else(|| host.vcpus.min(MOST_VCPUS));
    let memory_bytes = config.max_memory_bytes.unwrap_or(host.memory_bytes).min(MOST_MEMORY);
    made.or(Size { vcpus, memory_bytes: memory_bytes / STEP * STEP })
}

fn natural(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// The memory of a VM in which containers can have `limit` bytes.
fn memory_for(limit: u64) -> u64 {
    let bytes = limit.saturating_add(limit / PAGE_RECORDS).saturating_add(GUEST_OVERHEAD);
    bytes.clamp(LEAST, 1 << 46).next_multiple_of(STEP)
}

/// vCPUs that all these limits of CPU time together can keep busy.
fn cpus<'a>(limits: impl Iterator<Item = &'a cri::LinuxContainerResources>) -> u32 {
    let thousandths = limits.map(|limits| match (natural(limits.cpu_quota), natural(limits.cpu_period)) {
        (0, _) | (_, 0) => 0,
        (quota, period) => quota.saturating_mul(1000).div_ceil(period),
    });
    u32::try_from(thousandths.fold(0, u64::saturating_add).div_ceil(1000)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmmConfig {
        crate::config::Config::check(Default::default()).expect("the default").vmm
    }

    fn pod(memory: i64, quota: i64, overhead: i64) -> cri::LinuxPodSandboxConfig {
        let resources = cri::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            cpu_quota: quota,
            cpu_period: 100_000,
            ..Default::default()
        };
        let overhead = cri::LinuxContainerResources { memory_limit_in_bytes: overhead, ..Default::default() };
        cri::LinuxPodSandboxConfig { resources: Some(resources), overhead: Some(overhead), ..Default::default() }
    }

    const HOST: Size = Size { vcpus: 4, memory_bytes: 64 << 30 };

    #[test]
    fn a_pod_without_limits_has_the_configured_size() {
        let size = of(None, &config(), HOST);
        assert_eq!(size, Size { vcpus: config().vcpus, memory_bytes: config().memory_bytes });
        assert_eq!(of(Some(&pod(0, 0, 0)), &config(), HOST), size);
    }

    #[test]
    fn a_limit_is_for_the_containers_and_the_guest_comes_on_top() {
        let size = of(Some(&pod(1 << 30, 150_000, 64 << 20)), &config(), HOST);
        assert_eq!(size, Size { vcpus: 2, memory_bytes: (1088 << 20) + (17 << 20) + GUEST_OVERHEAD + (1 << 20) });
        assert_eq!(of(Some(&pod(1 << 20, 0, 0)), &config(), HOST).memory_bytes, LEAST);
    }

    #[test]
    fn containers_have_what_their_limits_say_together() {
        let limits = |memory, quota| pod(memory, quota, 0).resources.expect("given");
        let several = [limits(256 << 20, 60_000), limits(256 << 20, 60_000), limits(0, 0)];
        assert_eq!(
            of_containers(several.iter(), HOST),
            Size { vcpus: 2, memory_bytes: (512 << 20) + (8 << 20) + GUEST_OVERHEAD }
        );
        assert_eq!(of_containers([limits(0, -1)].iter(), HOST), Size { vcpus: 0, memory_bytes: 0 });
        let absurd = [limits(i64::MAX, i64::MAX), limits(i64::MAX, i64::MAX)];
        assert_eq!(of_containers(absurd.iter(), HOST), Size { vcpus: 4, memory_bytes: 1 << 46 });
    }

    #[test]
    fn a_vm_can_become_as_large_as_configured_or_as_the_host() {
        let made = Size { vcpus: 1, memory_bytes: 256 << 20 };
        assert_eq!(largest(made, &config(), HOST), HOST);
        let huge = Size { vcpus: 96, memory_bytes: 1 << 40 };
        assert_eq!(largest(made, &config(), huge), Size { vcpus: MOST_VCPUS, ..huge });
        assert_eq!(largest(huge, &config(), HOST), huge, "it is that large already");
        let config = VmmConfig { max_vcpus: Some(2), max_memory_bytes: Some(1 << 30), ..config() };
        assert_eq!(largest(made, &config, HOST), Size { vcpus: 2, memory_bytes: 1 << 30 });
    }

    #[test]
    fn absurd_limits_are_bounded() {
        let size = of(Some(&pod(i64::MAX, i64::MAX, i64::MAX)), &config(), HOST);
        assert_eq!(size, Size { vcpus: 4, memory_bytes: 1 << 46 });
        assert_eq!(of(Some(&pod(-1, -1, -1)), &config(), HOST).memory_bytes, config().memory_bytes);
    }
}
