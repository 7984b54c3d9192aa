//! Events of sandboxes and containers.

use futures_util::StreamExt;
use tonic::Status;

use super::Sandboxes;
use crate::cri;
use crate::events::{Change, Event};
use crate::grpc::{Batches, convert, status};

impl Sandboxes {
    /// GetContainerEvents.
    pub(super) async fn get_container_events(
        &self,
        _: cri::GetEventsRequest,
    ) -> Result<Batches<cri::ContainerEventResponse>, Status> {
        let events = self.runtime.context().index.events().subscribe();
        Ok(Box::pin(events.map(|event| event.map(shown).map_err(|error| status::of(&error)))))
    }
}

fn shown(event: Event) -> cri::ContainerEventResponse {
    let kind = match event.change {
        Change::Created => cri::ContainerEventType::ContainerCreatedEvent,
        Change::Started => cri::ContainerEventType::ContainerStartedEvent,
        Change::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
        Change::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
    };
    cri::ContainerEventResponse {
        container_id: event.subject,
        container_event_type: kind.into(),
        created_at: event.at,
        pod_sandbox_status: Some(convert::sandbox_status(&event.sandbox)),
        containers_statuses: event.containers.iter().map(|record| convert::container_status(record)).collect(),
    }
}
