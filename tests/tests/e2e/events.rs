//! GetContainerEvents.

use std::time::Duration;

use anyhow::{Context, bail};
use isopod_cri_server::cri::{self, ContainerEventType as Type, ContainerState, PodSandboxState};
use isopod_tests::fixture::{Cri, TestPod, shell};
use tonic::Streaming;

async fn subscribe(cri: &Cri) -> anyhow::Result<Streaming<cri::ContainerEventResponse>> {
    Ok(cri.runtime.clone().get_container_events(cri::GetEventsRequest {}).await?.into_inner())
}

/// The next event of the pod with this name.
async fn next(
    events: &mut Streaming<cri::ContainerEventResponse>,
    pod: &str,
) -> anyhow::Result<cri::ContainerEventResponse> {
    let of_pod = |event: &cri::ContainerEventResponse| {
        let metadata = event.pod_sandbox_status.as_ref().and_then(|status| status.metadata.as_ref());
        metadata.is_some_and(|metadata| metadata.name == pod)
    };
    loop {
        match tokio::time::timeout(Duration::from_secs(60), events.message()).await.context("no event in time")?? {
            Some(event) if of_pod(&event) => return Ok(event),
            Some(_) => {}
            None => bail!("the events ended"),
        }
    }
}

#[tokio::test]
async fn every_subscriber_sees_the_life_of_a_pod_step_by_step() -> anyhow::Result<()> {
    // Subscriptions on connections of their own, one of which is not read before the end.
    let (first, second) = (Cri::shared().await?, Cri::shared().await?);
    let (mut quick, mut patient) = (subscribe(&first).await?, subscribe(&second).await?);
    let pod = TestPod::run("events").await?;
    let name = pod.config.metadata.clone().unwrap_or_default().name;
    let (id, started) = (pod.id.clone(), next(&mut quick, &name).await?);
    assert_eq!(
        (started.container_id.as_str(), started.container_event_type()),
        (id.as_str(), Type::ContainerCreatedEvent)
    );
    assert_eq!(started.pod_sandbox_status.unwrap_or_default().state(), PodSandboxState::SandboxReady);

    let container = pod.start(shell("events", "exit 7")).await?;
    container.exited().await?;
    container.remove().await?;
    pod.stop().await?;
    let of_container = container.id.clone();
    pod.remove().await?;

    let expected = [
        (&id, Type::ContainerStartedEvent, None),
        (&of_container, Type::ContainerCreatedEvent, Some(ContainerState::ContainerCreated)),
        (&of_container, Type::ContainerStartedEvent, Some(ContainerState::ContainerRunning)),
        (&of_container, Type::ContainerStoppedEvent, Some(ContainerState::ContainerExited)),
        (&of_container, Type::ContainerDeletedEvent, None),
        (&id, Type::ContainerStoppedEvent, None),
        (&id, Type::ContainerDeletedEvent, None),
    ];
    next(&mut patient, &name).await?;
    for (subject, kind, state) in expected {
        for events in [&mut quick, &mut patient] {
            let event = next(events, &name).await?;
            assert_eq!((&event.container_id, event.container_event_type()), (subject, kind));
            assert_eq!(event.containers_statuses.first().map(cri::ContainerStatus::state), state, "{kind:?}");
            if state == Some(ContainerState::ContainerExited) {
                assert_eq!(event.containers_statuses[0].exit_code, 7);
            }
            assert!(event.created_at > 0);
        }
    }
    Ok(())
}
