//! How large a sandbox's VM is.

use serde::{Deserialize, Serialize};

use crate::config::VmmConfig;
use crate::cri;

const MIB: u64 = 1024 * 1024;
/// What the guest's kernel, agent and caches take of a VM made for a memory limit.
const GUEST_OVERHEAD: u64 = 64 * MIB;
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

/// The size for a pod: from its limits, and where it has none the configured one. `host_cpus` bounds the vCPUs.
pub fn of(pod: Option<&cri::LinuxPodSandboxConfig>, config: &VmmConfig, host_cpus: u32) -> Size {
    let resources = pod.and_then(|pod| pod.resources.clone()).unwrap_or_default();
    let overhead = pod.and_then(|pod| pod.overhead.clone()).unwrap_or_default();
    let natural = |value: i64| u64::try_from(value).unwrap_or(0);

    let memory_bytes = match natural(resources.memory_limit_in_bytes) {
        0 => config.memory_bytes,
        limit => {
            limit.saturating_add(natural(overhead.memory_limit_in_bytes)).saturating_add(GUEST_OVERHEAD).max(LEAST)
        }
    };
    let cpus = |limits: &cri::LinuxContainerResources| match (natural(limits.cpu_quota), natural(limits.cpu_period)) {
        (0, _) | (_, 0) => 0,
        (quota, period) => quota.div_ceil(period),
    };
    let vcpus = match cpus(&resources) {
        0 => config.vcpus,
        limit => u32::try_from(limit).unwrap_or(u32::MAX).min(host_cpus.max(1)),
    };
    Size { vcpus: vcpus.clamp(1, 64), memory_bytes: memory_bytes.min(1 << 46).next_multiple_of(STEP) }
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

    #[test]
    fn a_pod_without_limits_has_the_configured_size() {
        let size = of(None, &config(), 4);
        assert_eq!(size, Size { vcpus: config().vcpus, memory_bytes: config().memory_bytes });
        assert_eq!(of(Some(&pod(0, 0, 0)), &config(), 4), size);
    }

    #[test]
    fn a_limit_is_for_the_containers_and_the_guest_comes_on_top() {
        let size = of(Some(&pod(1 << 30, 150_000, 10 << 20)), &config(), 4);
        assert_eq!(size, Size { vcpus: 2, memory_bytes: (1 << 30) + (10 << 20) + GUEST_OVERHEAD });
        assert_eq!(of(Some(&pod(1 << 20, 0, 0)), &config(), 4).memory_bytes, LEAST);
    }

    #[test]
    fn absurd_limits_are_bounded() {
        let size = of(Some(&pod(i64::MAX, i64::MAX, i64::MAX)), &config(), 4);
        assert_eq!(size, Size { vcpus: 4, memory_bytes: 1 << 46 });
        assert_eq!(of(Some(&pod(-1, -1, -1)), &config(), 4).memory_bytes, config().memory_bytes);
    }
}
