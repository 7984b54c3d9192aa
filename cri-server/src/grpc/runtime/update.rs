//! Changes of the limits of what runs.

use tonic::Status;

use super::Sandboxes;
use crate::cri;
use crate::grpc::status;

impl Sandboxes {
    /// UpdateContainerResources.
    pub(super) async fn update_container_resources(
        &self,
        _: cri::UpdateContainerResourcesRequest,
    ) -> Result<cri::UpdateContainerResourcesResponse, Status> {
        Err(status::unimplemented("UpdateContainerResources"))
    }

    /// UpdatePodSandboxResources.
    pub(super) async fn update_pod_sandbox_resources(
        &self,
        _: cri::UpdatePodSandboxResourcesRequest,
    ) -> Result<cri::UpdatePodSandboxResourcesResponse, Status> {
        Err(status::unimplemented("UpdatePodSandboxResources"))
    }
}
