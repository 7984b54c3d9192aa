//! The CPUs and memory nodes of the host that a sandbox's VM may use: those of its containers together, if each of them names some.
//! The kubelet's CPU and memory managers give them (static policy).

use isopod_proto::ObjectId;

use super::SandboxError;
use super::driver::Driver;
use crate::cgroup::{self, CpuSets};
use crate::container::ContainerState;
use crate::cpu_set::CpuSet;
use crate::cri::LinuxContainerResources;
use crate::grpc::status::chain;

impl Driver {
    /// Puts the sets of all containers that have not ended into force, and with them those of `changed`, which is new, or has the
    /// limits given here from now on.
    pub(super) async fn apply_cpu_sets(
        &mut self,
        changed: Option<(&ObjectId, &LinuxContainerResources)>,
    ) -> Result<(), SandboxError> {
        let others = self.containers.values().filter(|container| {
            let ended = matches!(container.record.state, ContainerState::Exited(_));
            !ended && changed.is_none_or(|(id, _)| container.record.id != *id)
        });
        let limits: Vec<_> = others
            .map(|container| container.record.config.linux.as_ref().and_then(|linux| linux.resources.as_ref()))
            .chain(changed.map(|(_, limits)| Some(limits)))
            .collect();
        let of = |field: fn(&LinuxContainerResources) -> &String| {
            together(limits.iter().map(|limits| limits.map_or("", |limits| field(limits).as_str())))
        };
        let wanted = CpuSets { cpus: of(|limits| &limits.cpuset_cpus), mems: of(|limits| &limits.cpuset_mems) };
        if self.cpu_sets.as_ref() == Some(&wanted) {
            return Ok(());
        }
        // After an error it may be anything.
        self.cpu_sets = None;
        if let Some(path) = &self.record.cgroup {
            cgroup::restrict(path, &wanted).await.map_err(SandboxError::CpuSets)?;
        }
        self.cpu_sets = Some(wanted);
        Ok(())
    }

    /// The same when a container has ended, or has not come about.
    pub(super) async fn release_cpu_sets(&mut self) {
        if let Err(error) = self.apply_cpu_sets(None).await {
            tracing::warn!(error = chain(&error), "the VM keeps CPUs that its containers do not have any more");
        }
    }
}

/// All of the sets; none if one is empty, which stands for all there are.
fn together<'l>(lists: impl Iterator<Item = &'l str>) -> Option<CpuSet> {
    // What is not a list was refused before.
    lists.map(CpuSet::parse).reduce(|all, next| Some(all?.union(next?))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_have_their_sets_together_and_one_without_has_all() {
        let of = |lists: &[&str]| together(lists.iter().copied()).map(|set| set.to_string());
        assert_eq!(of(&["1", "3-4"]).as_deref(), Some("1,3-4"));
        assert_eq!(of(&["1", ""]), None);
        assert_eq!(of(&[]), None);
    }
}
