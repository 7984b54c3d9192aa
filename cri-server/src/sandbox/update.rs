//! Changes of limits while a sandbox is there: in the guest's cgroups first, then in the record. An error leaves both as they
//! were. What a VM does not have yet, it cannot get: a limit above its size is refused, so that nobody counts on it.

use std::collections::HashMap;

use isopod_proto::agent::{Resources, UpdateContainerRequest, UpdatePodRequest};

use super::driver::Driver;
use super::size::{self, Size};
use super::{SandboxError, SandboxPhase};
use crate::container::{ContainerState, SpecError, explicit_resources, guest_resources, merged_resources};
use crate::cri::{LinuxContainerResources, LinuxPodSandboxConfig};
use crate::grpc::status::chain;
use crate::guest::SHORT;
use isopod_proto::ObjectId;

const MIB: u64 = 1024 * 1024;

/// UpdateContainerResources.
pub struct ContainerUpdate {
    /// What changes; 0 and empty are "as it is".
    pub limits: LinuxContainerResources,
    /// Replace the container's, if there are any.
    pub annotations: HashMap<String, String>,
}

/// UpdatePodSandboxResources.
pub struct PodUpdate {
    /// What the sandbox costs beyond its containers.
    pub overhead: Option<LinuxContainerResources>,
    /// What its containers may use together.
    pub resources: Option<LinuxContainerResources>,
}

impl Driver {
    /// UpdateContainerResources.
    pub(super) async fn update_container(
        &mut self,
        id: &ObjectId,
        update: &ContainerUpdate,
    ) -> Result<(), SandboxError> {
        let not_found = || SandboxError::NotFound { what: "container", id: id.to_string() };
        let mut record = self.containers.get(id).ok_or_else(not_found)?.record.clone();
        let mut linux = record.config.linux.take().unwrap_or_default();
        let old = linux.resources.take().unwrap_or_default();
        let new = merged_resources(&old, &update.limits);
        let resources = guest_resources(&new).map_err(SandboxError::Spec)?;
        memory_fits(&update.limits, self.record.size)?;
        let in_guest = self.record.phase == SandboxPhase::Ready && !matches!(record.state, ContainerState::Exited(_));
        if in_guest && let Err(error) = self.enforce(id, &new, resources).await {
            self.release_cpu_sets().await;
            return Err(error);
        }
        linux.resources = Some(new);
        record.config.linux = Some(linux);
        if !update.annotations.is_empty() {
            record.config.annotations.clone_from(&update.annotations);
        }
        if let Err(error) = self.save_container(&record).await {
            if in_guest {
                self.release_cpu_sets().await;
                self.restore_in_guest(id, &old).await;
            }
            return Err(error);
        }
        if let Some(container) = self.containers.get_mut(id) {
            container.record = record;
        }
        Ok(())
    }

    /// Puts the limits `new` into force, of which the guest gets `resources`. After an error CPU sets may be in force.
    async fn enforce(
        &mut self,
        id: &ObjectId,
        new: &LinuxContainerResources,
        resources: Resources,
    ) -> Result<(), SandboxError> {
        self.apply_cpu_sets(Some((id, new))).await?;
        self.update_in_guest(id, resources).await
    }

    async fn update_in_guest(&self, id: &ObjectId, resources: Resources) -> Result<(), SandboxError> {
        let mut client = self.up()?.guest.client();
        let request = UpdateContainerRequest { id: id.to_string(), resources: Some(resources) };
        let answer = client.update_container(request);
        let failed = |source| SandboxError::Guest { doing: "cannot change the container's limits", source };
        self.call("UpdateContainer", SHORT, answer).await.map(drop).map_err(failed)
    }

    async fn restore_in_guest(&self, id: &ObjectId, old: &LinuxContainerResources) {
        let Ok(resources) = guest_resources(&explicit_resources(old)) else { return };
        if let Err(error) = self.update_in_guest(id, resources).await {
            tracing::error!(container = %id, error = chain(&error), "limits that are not kept stay in force");
        }
    }

    /// UpdatePodSandboxResources: the limits of the guest's cgroup of all containers. The VM's own cgroup on the host is below
    /// the pod's, whose limits the kubelet changes itself.
    pub(super) async fn update_pod(&mut self, update: &PodUpdate) -> Result<(), SandboxError> {
        no_cpu_sets(update).map_err(SandboxError::Spec)?;
        let pod = self.record.config.linux.clone().unwrap_or_default();
        let new = merged_pod(&pod, update);
        let resources = guest_resources(&new.resources.clone().unwrap_or_default()).map_err(SandboxError::Spec)?;
        if self.record.phase == SandboxPhase::Ready {
            let host_cpus = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
            pod_fits(size::of(Some(&new), &self.context.config.vmm, host_cpus), self.record.size)?;
            self.update_pod_in_guest(resources).await?;
        }
        self.record.config.linux = Some(new);
        if let Err(error) = self.save().await {
            let old = guest_resources(&explicit_resources(&pod.resources.clone().unwrap_or_default()));
            if self.record.phase == SandboxPhase::Ready
                && let Ok(old) = old
                && let Err(error) = self.update_pod_in_guest(old).await
            {
                tracing::error!(error = chain(&error), "limits that are not kept stay in force");
            }
            self.record.config.linux = Some(pod);
            return Err(error);
        }
        Ok(())
    }

    async fn update_pod_in_guest(&self, resources: Resources) -> Result<(), SandboxError> {
        let mut client = self.up()?.guest.client();
        let answer = client.update_pod(UpdatePodRequest { resources: Some(resources) });
        let failed = |source| SandboxError::Guest { doing: "cannot change the sandbox's limits", source };
        self.call("UpdatePod", SHORT, answer).await.map(drop).map_err(failed)
    }
}

fn merged_pod(pod: &LinuxPodSandboxConfig, update: &PodUpdate) -> LinuxPodSandboxConfig {
    let merge = |old: &Option<LinuxContainerResources>, new: &Option<LinuxContainerResources>| match new {
        Some(new) => Some(merged_resources(&old.clone().unwrap_or_default(), new)),
        None => old.clone(),
    };
    LinuxPodSandboxConfig {
        overhead: merge(&pod.overhead, &update.overhead),
        resources: merge(&pod.resources, &update.resources),
        ..pod.clone()
    }
}

/// Containers have sets, and the VM those of all of them; nobody gives them to a pod.
fn no_cpu_sets(update: &PodUpdate) -> Result<(), SpecError> {
    let mut limits = [&update.resources, &update.overhead].into_iter().flatten();
    match limits.find(|limits| !limits.cpuset_cpus.is_empty() || !limits.cpuset_mems.is_empty()) {
        Some(_) => Err(SpecError::Unsupported { field: "resources.cpuset_cpus", what: "CPU sets of a pod".to_owned() }),
        None => Ok(()),
    }
}

/// A VM of an earlier daemon has a size that is not known; there everything fits.
fn memory_fits(update: &LinuxContainerResources, vm: Option<Size>) -> Result<(), SandboxError> {
    let wanted = u64::try_from(update.memory_limit_in_bytes).unwrap_or(0);
    match vm {
        Some(vm) if wanted > vm.memory_bytes => Err(SandboxError::BeyondVm {
            field: "linux.memory_limit_in_bytes",
            wanted: format!("{wanted} bytes"),
            has: format!("{} bytes", vm.memory_bytes),
        }),
        _ => Ok(()),
    }
}

/// Whether a VM as large as a new pod of these limits would get is no larger than the one there is.
fn pod_fits(wanted: Size, vm: Option<Size>) -> Result<(), SandboxError> {
    let Some(vm) = vm else { return Ok(()) };
    if wanted.memory_bytes > vm.memory_bytes {
        return Err(SandboxError::BeyondVm {
            field: "resources.memory_limit_in_bytes",
            wanted: format!("a VM of {} MiB", wanted.memory_bytes / MIB),
            has: format!("{} MiB", vm.memory_bytes / MIB),
        });
    }
    if wanted.vcpus > vm.vcpus {
        return Err(SandboxError::BeyondVm {
            field: "resources.cpu_quota",
            wanted: format!("a VM of {} CPUs", wanted.vcpus),
            has: format!("{}", vm.vcpus),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use isopod_proto::ErrorKind;

    use super::*;

    const VM: Size = Size { vcpus: 2, memory_bytes: 512 * MIB };

    #[test]
    fn a_limit_above_the_vms_memory_is_refused_with_both_numbers() {
        let limit = |memory| LinuxContainerResources { memory_limit_in_bytes: memory, ..Default::default() };
        for good in [0, -1, 1, 512 << 20] {
            assert!(memory_fits(&limit(good), Some(VM)).is_ok());
        }
        let error = memory_fits(&limit(1 << 30), Some(VM)).expect_err("too much");
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(error.to_string().contains("1073741824") && error.to_string().contains("536870912"), "{error}");
        assert!(memory_fits(&limit(1 << 30), None).is_ok());
    }

    #[test]
    fn a_pod_may_shrink_and_not_outgrow_its_vm() {
        assert!(pod_fits(VM, Some(VM)).is_ok());
        assert!(pod_fits(Size { vcpus: 1, memory_bytes: 128 * MIB }, Some(VM)).is_ok());
        let memory = pod_fits(Size { memory_bytes: 514 * MIB, ..VM }, Some(VM)).expect_err("too much");
        assert!(memory.to_string().contains("514 MiB"), "{memory}");
        let cpus = pod_fits(Size { vcpus: 3, ..VM }, Some(VM)).expect_err("too many");
        assert!(cpus.to_string().contains("3 CPUs"), "{cpus}");
    }

    #[test]
    fn what_an_update_of_a_pod_does_not_give_stays() {
        let resources = Some(LinuxContainerResources { cpu_shares: 5, ..Default::default() });
        let pod = LinuxPodSandboxConfig { resources, cgroup_parent: "/x".into(), ..Default::default() };
        let update = PodUpdate {
            overhead: Some(LinuxContainerResources { memory_limit_in_bytes: 7, ..Default::default() }),
            resources: None,
        };
        let new = merged_pod(&pod, &update);
        assert_eq!((new.cgroup_parent.as_str(), &new.resources), ("/x", &pod.resources));
        assert_eq!(new.overhead.expect("given").memory_limit_in_bytes, 7);
    }
}
