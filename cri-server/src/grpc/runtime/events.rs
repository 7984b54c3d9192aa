//! Events of sandboxes and containers.

use tonic::Status;

use super::Sandboxes;
use crate::cri;
use crate::grpc::{Batches, status};

impl Sandboxes {
    /// GetContainerEvents.
    pub(super) async fn get_container_events(
        &self,
        _: cri::GetEventsRequest,
    ) -> Result<Batches<cri::ContainerEventResponse>, Status> {
        Err(status::unimplemented("GetContainerEvents"))
    }
}
