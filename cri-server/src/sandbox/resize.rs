//! The size of a VM that runs: it follows the limits of its pod and containers.
//!
//! Memory comes by the VMM's memory device, and processors that are there from the start are brought up by the agent. A VM is larger
//! before its limits are, and smaller after them. It never becomes smaller than it was made.

use std::time::Duration;

use isopod_proto::ObjectId;
use isopod_proto::agent::SetCpusRequest;
use tokio::time::{Instant, sleep};

use super::driver::Driver;
use super::size::{self, Size};
use super::{SandboxError, SandboxPhase};
use crate::container::ContainerState;
use crate::cri::{LinuxContainerResources, LinuxPodSandboxConfig};
use crate::grpc::status::chain;
use crate::guest::SHORT;
use crate::vmm::{self, VmCapacity, VmmError};

const MIB: u64 = 1024 * 1024;
/// Memory is plugged in multiples of this, as the VMM's memory device does.
const BLOCK: u64 = 4 * MIB;
/// How long the guest may take until it has the memory it was asked to have.
const PLUG: Duration = Duration::from_secs(60);
/// How long it is waited for that the guest gives memory back: the pod's cgroup on the host may become smaller right after the answer.
const UNPLUG: Duration = Duration::from_secs(10);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// How large a VM should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// So that the pod's limit, and that which changes, can be used up.
    pub least: Size,
    /// So that all limits can be used up at once, which may be more than there is.
    pub best: Size,
}

impl Driver {
    /// The size that the VM should have with these limits of the pod, and of its containers with those of `changed` in place of its own.
    pub(super) fn wanted_size(
        &self,
        pod: Option<&LinuxPodSandboxConfig>,
        changed: Option<(&ObjectId, &LinuxContainerResources)>,
    ) -> Wanted {
        let config = &self.context.config.vmm;
        let host = Size::of_host(config);
        let alive = self.containers.values().filter(|one| !matches!(one.record.state, ContainerState::Exited(_)));
        let limits = alive.filter_map(|container| match changed {
            Some((id, limits)) if *id == container.record.id => Some(limits),
            _ => container.record.config.linux.as_ref()?.resources.as_ref(),
        });
        let pod = size::of(pod, config, host);
        let one = size::of_containers(changed.map(|(_, limits)| limits).into_iter(), host);
        Wanted { least: pod.or(one), best: pod.or(size::of_containers(limits, host)) }
    }

    /// Has the VM as large as `wanted`, at least. After an error it is as large as it was, as far as the guest lets go of what it got.
    pub(super) async fn grow(&mut self, wanted: Wanted) -> Result<(), SandboxError> {
        // Of a VM of an earlier version of the daemon the size is not known: what there is has to do.
        let Some(size) = self.record.size.filter(|_| self.record.phase == SandboxPhase::Ready) else { return Ok(()) };
        if size.or(wanted.best) == size {
            return Ok(());
        }
        let capacity = self.capacity().await?;
        let target = capacity.target(size, wanted)?;
        let grown = self.grow_to(size, target).await;
        if grown.is_err() {
            self.shrink_to(size, capacity).await;
        }
        grown
    }

    async fn grow_to(&mut self, size: Size, target: Size) -> Result<(), SandboxError> {
        if target.memory_bytes > size.memory_bytes {
            self.resize_memory(target.memory_bytes, PLUG, |now| now >= target.memory_bytes).await?;
        }
        if target.vcpus > size.vcpus {
            self.set_cpus(target.vcpus).await?;
        }
        tracing::info!(vcpus = target.vcpus, memory_mib = target.memory_bytes / MIB, "the VM is larger");
        self.record.size = Some(target);
        self.save().await
    }

    /// Lets the VM be as small as `wanted`, at the least as it was made. What the guest does not give back within [`UNPLUG`] it keeps for
    /// now: it counts to the pod's cgroup either way.
    pub(super) async fn shrink(&mut self, Wanted { best: wanted, .. }: Wanted) {
        let Some(size) = self.record.size.filter(|_| self.record.phase == SandboxPhase::Ready) else { return };
        if wanted.or(size) == wanted {
            return;
        }
        let capacity = match self.capacity().await {
            Ok(capacity) => capacity,
            Err(error) => {
                tracing::warn!(error = chain(&error), "the VM stays as large as it is");
                return;
            }
        };
        let target = capacity.least(size, wanted);
        // One of an earlier version stays as it is.
        if capacity.is_told() && target != size {
            self.shrink_to(target, capacity).await;
        }
    }

    async fn shrink_to(&mut self, target: Size, capacity: VmCapacity) {
        if capacity.can_grow()
            && let Err(error) = self.resize_memory(target.memory_bytes, UNPLUG, |now| now <= target.memory_bytes).await
        {
            tracing::warn!(error = chain(&error), "the VM keeps its memory for now");
        }
        if let Err(error) = self.set_cpus(target.vcpus).await {
            tracing::warn!(error = chain(&error), "the VM keeps its CPUs");
        }
        tracing::info!(vcpus = target.vcpus, memory_mib = target.memory_bytes / MIB, "the VM may be smaller");
        self.record.size = Some(target);
        if let Err(error) = self.save().await {
            tracing::warn!(error = chain(&error), "the size of the VM is not recorded");
        }
    }

    async fn capacity(&self) -> Result<VmCapacity, SandboxError> {
        let failed = |source| SandboxError::Vmm { doing: "cannot find out how large the VM can be", source };
        vmm::capacity(self.up()?.vm.directory()).await.map_err(failed)
    }

    /// Asks the guest to have so much memory, and waits until what it has is `enough`.
    async fn resize_memory(
        &self,
        bytes: u64,
        deadline: Duration,
        enough: impl Fn(u64) -> bool,
    ) -> Result<(), SandboxError> {
        let up = self.up()?.clone();
        let failed = |source: VmmError| SandboxError::Vmm { doing: "cannot change the VM's memory", source };
        vmm::resize_memory(up.vm.directory(), bytes).await.map_err(failed)?;
        let end = Instant::now() + deadline;
        while !enough(vmm::capacity(up.vm.directory()).await.map_err(failed)?.memory_bytes) {
            if Instant::now() >= end {
                return Err(SandboxError::Late { what: "a change of the guest's memory", seconds: deadline.as_secs() });
            }
            tokio::select! {
                () = sleep(LOOK) => {}
                _ = up.vm.ended() => return Err(SandboxError::VmEnded { doing: "its memory was changed" }),
                () = self.stopping.cancelled() => return Err(SandboxError::Ended),
            }
        }
        Ok(())
    }

    async fn set_cpus(&self, count: u32) -> Result<(), SandboxError> {
        let mut client = self.up()?.guest.client();
        let answer = client.set_cpus(SetCpusRequest { count });
        let failed = |source| SandboxError::Guest { doing: "cannot change the CPUs of the VM", source };
        self.call("SetCpus", SHORT, answer).await.map(drop).map_err(failed)
    }
}

impl VmCapacity {
    /// Whether the VMM knows what its VM can have.
    fn is_told(&self) -> bool {
        self.max_vcpus > 0
    }

    /// Whether the VM can get memory at all.
    fn can_grow(&self) -> bool {
        self.max_memory_bytes > self.min_memory_bytes
    }

    /// The least size of memory that it can have and that is at least `bytes`.
    fn reach(&self, bytes: u64) -> Option<u64> {
        let more = bytes.saturating_sub(self.min_memory_bytes).checked_next_multiple_of(BLOCK)?;
        self.min_memory_bytes.checked_add(more).filter(|reached| *reached <= self.max_memory_bytes)
    }

    /// The least that a VM of `size` can be, and is still as large as `wanted` where it was.
    fn least(&self, size: Size, wanted: Size) -> Size {
        let memory_bytes = self.reach(wanted.memory_bytes).unwrap_or(size.memory_bytes).min(size.memory_bytes);
        Size { vcpus: wanted.vcpus.max(self.vcpus).min(size.vcpus), memory_bytes }
    }

    /// What a VM of `size` becomes: as large as is best, as far as it can be, or an error if that is not enough.
    fn target(&self, size: Size, Wanted { least, best }: Wanted) -> Result<Size, SandboxError> {
        let (least, best) = (size.or(least), size.or(best));
        let refused = |field, wanted, most| Err(SandboxError::BeyondVm { field, wanted, most });
        let most_vcpus = self.max_vcpus.max(size.vcpus);
        if least.vcpus > most_vcpus {
            return refused("cpu_quota", format!("a VM of {} CPUs", least.vcpus), most_vcpus.to_string());
        }
        let most = self.max_memory_bytes.max(size.memory_bytes);
        if least.memory_bytes > size.memory_bytes && self.reach(least.memory_bytes).is_none() {
            let wanted = format!("a VM of {} MiB", least.memory_bytes.div_ceil(MIB));
            return refused("memory_limit_in_bytes", wanted, format!("{} MiB", most / MIB));
        }
        let memory_bytes = match best.memory_bytes {
            bytes if bytes == size.memory_bytes => bytes,
            bytes => self.reach(bytes).unwrap_or(most),
        };
        Ok(Size { vcpus: best.vcpus.min(most_vcpus), memory_bytes })
    }
}

#[cfg(test)]
mod tests {
    use isopod_proto::ErrorKind;

    use super::*;

    const CAPACITY: VmCapacity = VmCapacity {
        vcpus: 1,
        max_vcpus: 4,
        min_memory_bytes: 130 * MIB,
        memory_bytes: 130 * MIB,
        max_memory_bytes: 130 * MIB + 100 * BLOCK,
    };

    #[test]
    fn a_size_is_what_it_was_made_with_and_whole_blocks() {
        for (wanted, reached) in [(0, 130), (130, 130), (131, 134), (134, 134), (530, 530)] {
            assert_eq!(CAPACITY.reach(wanted * MIB), Some(reached * MIB), "{wanted}");
        }
        assert_eq!((CAPACITY.reach(531 * MIB), CAPACITY.reach(u64::MAX)), (None, None));
        let old = VmCapacity { max_memory_bytes: CAPACITY.min_memory_bytes, ..CAPACITY };
        assert!(CAPACITY.can_grow() && !old.can_grow());
    }

    #[test]
    fn what_must_be_is_or_is_refused_with_both_numbers_and_what_is_best_as_far_as_it_goes() {
        let size = |vcpus, mib: u64| Size { vcpus, memory_bytes: mib * MIB };
        let target = |least, best| CAPACITY.target(size(1, 130), Wanted { least, best });
        assert_eq!(target(size(1, 130), size(2, 250)).expect("it can be"), size(2, 250));
        assert_eq!(target(size(0, 0), size(9, 9000)).expect("it can be"), size(4, 530));
        assert_eq!(target(size(4, 530), size(4, 530)).expect("it can be"), size(4, 530));
        assert_eq!(target(size(0, 0), size(2, 0)).expect("it can be"), size(2, 130));
        for (least, words) in [(size(1, 531), ["531 MiB", "530 MiB"]), (size(5, 0), ["5 CPUs", "to, 4"])] {
            let error = target(least, least).expect_err("it cannot be");
            assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
            assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
        }
    }

    #[test]
    fn a_vm_becomes_no_smaller_than_it_was_made_and_never_larger_by_shrinking() {
        let size = |vcpus, mib: u64| Size { vcpus, memory_bytes: mib * MIB };
        for (wanted, least) in [
            (size(2, 200), size(2, 202)),
            (size(0, 0), size(1, 130)),
            (size(3, 300), size(3, 302)),
            (size(9, 9000), size(3, 302)),
            (size(1, 9000), size(1, 302)),
        ] {
            assert_eq!(CAPACITY.least(size(3, 302), wanted), least, "{wanted:?}");
        }
    }

    #[test]
    fn a_vmm_that_tells_of_no_room_grows_no_vm() {
        let capacity = VmCapacity { max_vcpus: 0, max_memory_bytes: 0, min_memory_bytes: 0, ..CAPACITY };
        assert!(CAPACITY.is_told() && !capacity.is_told());
        let size = Size { vcpus: 2, memory_bytes: 256 * MIB };
        let wanted = |vcpus, mib: u64| {
            let size = Size { vcpus, memory_bytes: mib * MIB };
            Wanted { least: size, best: size }
        };
        assert_eq!(capacity.target(size, wanted(2, 256)).expect("it is that large"), size);
        assert!(capacity.target(size, wanted(3, 1)).is_err() && capacity.target(size, wanted(1, 257)).is_err());
    }
}
