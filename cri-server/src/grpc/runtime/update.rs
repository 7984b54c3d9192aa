//! Changes of the limits of what runs.

use tonic::Status;

use super::{Sandboxes, failed};
use crate::cri;
use crate::grpc::observe;
use crate::sandbox::command::Command;
use crate::sandbox::update::{ContainerUpdate, PodUpdate};

impl Sandboxes {
    /// UpdateContainerResources.
    pub(super) async fn update_container_resources(
        &self,
        request: cri::UpdateContainerResourcesRequest,
    ) -> Result<cri::UpdateContainerResourcesResponse, Status> {
        let cri::UpdateContainerResourcesRequest { container_id, linux, annotations } = request;
        observe("UpdateContainerResources", &container_id, async {
            let (sandbox, container) = self.existing(&container_id)?;
            let update = Box::new(ContainerUpdate { limits: linux.unwrap_or_default(), annotations });
            let command = |reply| Command::UpdateContainer(container, update, reply);
            self.runtime.ask(&sandbox, command).await.map_err(failed)?;
            Ok(cri::UpdateContainerResourcesResponse {})
        })
        .await
    }

    /// UpdatePodSandboxResources.
    pub(super) async fn update_pod_sandbox_resources(
        &self,
        request: cri::UpdatePodSandboxResourcesRequest,
    ) -> Result<cri::UpdatePodSandboxResourcesResponse, Status> {
        let cri::UpdatePodSandboxResourcesRequest { pod_sandbox_id, overhead, resources } = request;
        observe("UpdatePodSandboxResources", &pod_sandbox_id, async {
            let sandbox = self.runtime.context().index.sandbox(&pod_sandbox_id).map_err(failed)?;
            let update = Box::new(PodUpdate { overhead, resources });
            self.runtime.ask(&sandbox.id, |reply| Command::UpdatePod(update, reply)).await.map_err(failed)?;
            Ok(cri::UpdatePodSandboxResourcesResponse {})
        })
        .await
    }
}
