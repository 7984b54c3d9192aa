//! `isopod stop-all`: ends the pods of this node, for its shutdown.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures_util::future::join_all;
use tonic::transport::Channel;

use crate::client::{connect, said};
use crate::config::Config;
use crate::cri::runtime_service_client::RuntimeServiceClient;
use crate::cri::{
    Container, ContainerFilter, ContainerState, ContainerStateValue, ListContainersRequest, ListPodSandboxRequest,
    MAX_MESSAGE, PodSandbox, PodSandboxState, StopContainerRequest, StopPodSandboxRequest,
};

/// The namespace whose pods the others may need until their end: they are stopped last, as on a node that the kubelet shuts down.
const LAST: &str = "kube-system";
/// How long a call may take beyond the grace.
const DEADLINE: Duration = Duration::from_secs(90);

/// Stops all pods: first those outside of [`LAST`], all at once, then the rest. Their containers are asked to end, and killed after
/// `grace`. Every pod is tried; an error says how many did not stop.
pub async fn run(config: &Config, grace: Duration) -> anyhow::Result<()> {
    let socket = config.socket.display();
    let channel = connect(&config.socket).await?.with_context(|| format!("no daemon listens on {socket}"))?;
    let client = RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let listed = client.clone().list_pod_sandbox(ListPodSandboxRequest::default()).await.map_err(said)?;
    let mut pods = listed.into_inner().items;
    pods.retain(|pod| pod.state() == PodSandboxState::SandboxReady);
    let is_last = |pod: &PodSandbox| pod.metadata.as_ref().is_some_and(|metadata| metadata.namespace == LAST);
    let (last, first): (Vec<_>, Vec<_>) = pods.into_iter().partition(is_last);
    let mut failed = 0;
    for group in [first, last] {
        let results = join_all(group.iter().map(|pod| stop(client.clone(), pod, grace))).await;
        for (pod, result) in group.iter().zip(results) {
            let metadata = pod.metadata.clone().unwrap_or_default();
            let name = format!("{}/{}", metadata.namespace, metadata.name);
            match result {
                Ok(()) => println!("{} {name}", pod.id),
                Err(error) => {
                    eprintln!("isopod: pod {name} is not stopped: {error:#}");
                    failed += 1;
                }
            }
        }
    }
    ensure!(failed == 0, "{failed} pods are not stopped");
    Ok(())
}

async fn stop(mut client: RuntimeServiceClient<Channel>, pod: &PodSandbox, grace: Duration) -> anyhow::Result<()> {
    let filter = ContainerFilter {
        pod_sandbox_id: pod.id.clone(),
        state: Some(ContainerStateValue { state: ContainerState::ContainerRunning.into() }),
        ..ContainerFilter::default()
    };
    let listed = client.list_containers(ListContainersRequest { filter: Some(filter) }).await.map_err(said)?;
    let containers = listed.into_inner().containers;
    // One that does not stop ends with its pod.
    join_all(containers.iter().map(|container| stop_container(client.clone(), container, grace))).await;
    let request = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
    let stopped = tokio::time::timeout(DEADLINE, client.stop_pod_sandbox(request)).await;
    stopped.with_context(|| format!("StopPodSandbox takes longer than {DEADLINE:?}"))?.map(drop).map_err(said)
}

async fn stop_container(mut client: RuntimeServiceClient<Channel>, container: &Container, grace: Duration) {
    let timeout = grace.as_secs().try_into().unwrap_or(i64::MAX);
    let request = StopContainerRequest { container_id: container.id.clone(), timeout };
    let problem = match tokio::time::timeout(grace + DEADLINE, client.stop_container(request)).await {
        Ok(Ok(_)) => return,
        Ok(Err(status)) => status.message().to_owned(),
        Err(_) => "it takes too long".to_owned(),
    };
    eprintln!("isopod: container {} is not stopped before its pod: {problem}", container.id);
}
