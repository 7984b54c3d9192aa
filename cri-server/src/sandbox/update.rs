//! Changes of limits while a sandbox is there: the VM grows first, then the guest's cgroups and the record change, and then the VM
//! shrinks. An error leaves all as they were: a limit that the VM cannot have is refused, so that nobody counts on it.

use std::collections::HashMap;

use isopod_proto::agent::{Resources, UpdateContainerRequest, UpdatePodRequest};

use super::driver::Driver;
use super::{SandboxError, SandboxPhase};
use crate::container::{ContainerState, SpecError, explicit_resources, guest_resources, merged_resources};
use crate::cri::{LinuxContainerResources, LinuxPodSandboxConfig};
use crate::grpc::status::chain;
use crate::guest::SHORT;
use isopod_proto::ObjectId;

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
        let in_guest = self.record.phase == SandboxPhase::Ready && !matches!(record.state, ContainerState::Exited(_));
        // The kubelet also changes CPU sets alone.
        let resizes = in_guest && (update.limits.memory_limit_in_bytes != 0 || update.limits.cpu_quota != 0);
        if resizes {
            self.grow(self.wanted_size(self.record.config.linux.as_ref(), Some((id, &new)))).await?;
        }
        if in_guest && let Err(error) = self.enforce(id, &new, resources).await {
            self.release_cpu_sets().await;
            self.shrink_if(resizes).await;
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
            self.shrink_if(resizes).await;
            return Err(error);
        }
        if let Some(container) = self.containers.get_mut(id) {
            container.record = record;
        }
        self.shrink_if(resizes).await;
        Ok(())
    }

    /// Lets the VM be as small as the limits that are in force allow, if they may have changed.
    async fn shrink_if(&mut self, resizes: bool) {
        if resizes {
            self.shrink(self.wanted_size(self.record.config.linux.as_ref(), None)).await;
        }
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
        let ready = self.record.phase == SandboxPhase::Ready;
        if ready {
            self.grow(self.wanted_size(Some(&new), None)).await?;
            if let Err(error) = self.update_pod_in_guest(resources).await {
                self.shrink_if(true).await;
                return Err(error);
            }
        }
        self.record.config.linux = Some(new);
        if let Err(error) = self.save().await {
            let old = guest_resources(&explicit_resources(&pod.resources.clone().unwrap_or_default()));
            if ready
                && let Ok(old) = old
                && let Err(error) = self.update_pod_in_guest(old).await
            {
                tracing::error!(error = chain(&error), "limits that are not kept stay in force");
            }
            self.record.config.linux = Some(pod);
            self.shrink_if(ready).await;
            return Err(error);
        }
        self.shrink_if(ready).await;
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

#[cfg(test)]
mod tests {
    use super::*;

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
