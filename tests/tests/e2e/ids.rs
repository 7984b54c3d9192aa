//! Ids in requests: a full one, or the beginning of one alone, as containerd and cri-o take it; anything else is refused.

use isopod_cri_server::cri;
use isopod_cri_server::cri::runtime_service_client::RuntimeServiceClient;
use isopod_tests::fixture::{Cri, TestContainer, TestPod, shell};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Calls that name a sandbox. What they would do to one is harmless, but for the first two.
const OF_SANDBOXES: [&str; 7] = [
    "RemovePodSandbox",
    "StopPodSandbox",
    "PodSandboxStatus",
    "CreateContainer",
    "PortForward",
    "PodSandboxStats",
    "UpdatePodSandboxResources",
];
/// Calls that name a container; as above.
const OF_CONTAINERS: [&str; 10] = [
    "RemoveContainer",
    "StopContainer",
    "StartContainer",
    "ContainerStatus",
    "UpdateContainerResources",
    "ReopenContainerLog",
    "ExecSync",
    "Exec",
    "Attach",
    "ContainerStats",
];
/// Calls after which what they name is gone or has ended, so that they succeed where there is nothing.
const IDEMPOTENT: [&str; 4] = ["RemovePodSandbox", "StopPodSandbox", "RemoveContainer", "StopContainer"];

/// Makes a call of one of the lists with this id, and with nothing else wrong.
async fn call(mut runtime: RuntimeServiceClient<Channel>, rpc: &str, id: &str) -> Result<(), Status> {
    let (pod_sandbox_id, container_id, id) = (id.to_owned(), id.to_owned(), id.to_owned());
    let cmd = vec!["true".to_owned()];
    match rpc {
        "RemovePodSandbox" => {
            runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id }).await.map(drop)
        }
        "StopPodSandbox" => runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id }).await.map(drop),
        "PodSandboxStatus" => {
            let request = cri::PodSandboxStatusRequest { pod_sandbox_id, verbose: true };
            runtime.pod_sandbox_status(request).await.map(drop)
        }
        "CreateContainer" => {
            let (config, sandbox_config) = (Some(shell("id", "true")), Some(TestPod::config("id")));
            let request = cri::CreateContainerRequest { pod_sandbox_id, config, sandbox_config };
            runtime.create_container(request).await.map(drop)
        }
        "PortForward" => {
            let request = cri::PortForwardRequest { pod_sandbox_id, port: Vec::new() };
            runtime.port_forward(request).await.map(drop)
        }
        "PodSandboxStats" => runtime.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id }).await.map(drop),
        "UpdatePodSandboxResources" => {
            let request = cri::UpdatePodSandboxResourcesRequest { pod_sandbox_id, ..Default::default() };
            runtime.update_pod_sandbox_resources(request).await.map(drop)
        }
        "RemoveContainer" => runtime.remove_container(cri::RemoveContainerRequest { container_id }).await.map(drop),
        "StopContainer" => {
            runtime.stop_container(cri::StopContainerRequest { container_id, timeout: 0 }).await.map(drop)
        }
        "StartContainer" => runtime.start_container(cri::StartContainerRequest { container_id }).await.map(drop),
        "ContainerStatus" => {
            let request = cri::ContainerStatusRequest { container_id, verbose: true };
            runtime.container_status(request).await.map(drop)
        }
        "UpdateContainerResources" => {
            let request = cri::UpdateContainerResourcesRequest { container_id, ..Default::default() };
            runtime.update_container_resources(request).await.map(drop)
        }
        "ReopenContainerLog" => {
            runtime.reopen_container_log(cri::ReopenContainerLogRequest { container_id }).await.map(drop)
        }
        "ExecSync" => runtime.exec_sync(cri::ExecSyncRequest { container_id, cmd, timeout: 0 }).await.map(drop),
        "Exec" => {
            let request = cri::ExecRequest { container_id, cmd, stdout: true, ..Default::default() };
            runtime.exec(request).await.map(drop)
        }
        "Attach" => {
            let request = cri::AttachRequest { container_id, stdout: true, ..Default::default() };
            runtime.attach(request).await.map(drop)
        }
        "ContainerStats" => runtime.container_stats(cri::ContainerStatsRequest { container_id }).await.map(drop),
        _ => Err(Status::internal(format!("the test does not know {rpc} of {id}"))),
    }
}

/// Checks that a call with an id that stands for nothing finds nothing, or has nothing to do.
async fn finds_nothing(cri: &Cri, rpc: &str, id: &str) {
    let result = call(cri.runtime.clone(), rpc, id).await;
    if IDEMPOTENT.contains(&rpc) {
        assert!(result.is_ok(), "{rpc} of {id:.100?}: {result:?}");
        return;
    }
    let status = result.expect_err(rpc);
    assert_eq!(status.code(), Code::NotFound, "{rpc} of {id:.100?}: {status}");
    let beginning: String = id.chars().take(40).collect();
    assert!(status.message().contains(&beginning) || beginning.contains('\n'), "{rpc}: {status}");
    assert!(status.message().len() < 1000, "{rpc} repeats an id of {} bytes", id.len());
}

#[tokio::test]
async fn empty_ids_are_refused_and_unknown_ones_are_not_found() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    let long = "f".repeat(100_000);
    let unknown = ["no-such-id", "../../etc/passwd", "0000\n0000", "id with spaces", "é", &"0".repeat(64), &long];
    for rpc in OF_SANDBOXES.into_iter().chain(OF_CONTAINERS) {
        let status = call(cri.runtime.clone(), rpc, "").await.expect_err(rpc);
        assert_eq!(status.code(), Code::InvalidArgument, "{rpc}: {status}");
        assert!(status.message().contains("id is empty"), "{rpc}: {status}");
        for id in unknown {
            finds_nothing(&cri, rpc, id).await;
        }
    }
    let filter = cri::PodSandboxFilter { id: "no-such-id".to_owned(), ..Default::default() };
    assert!(cri.sandboxes(Some(filter)).await?.is_empty());
    let filter = cri::ContainerFilter { id: "no-such-id".to_owned(), ..Default::default() };
    assert!(cri.containers(Some(filter)).await?.is_empty());
    cri.remove_image("docker.io/library/no-such:latest").await?;
    Ok(())
}

/// Containers of a pod, two of whose ids begin with the same digit, and these two.
async fn two_alike(pod: &TestPod) -> anyhow::Result<(Vec<TestContainer>, [String; 2])> {
    let mut containers: Vec<TestContainer> = Vec::new();
    // There are sixteen digits.
    for _ in 0..17 {
        let new = pod.create(shell("alike", "sleep 1000")).await?;
        let alike =
            containers.iter().find(|old| old.id[..1] == new.id[..1]).map(|old| [old.id.clone(), new.id.clone()]);
        containers.push(new);
        if let Some(alike) = alike {
            return Ok((containers, alike));
        }
    }
    anyhow::bail!("ids are not hexadecimal: {containers:?}")
}

#[tokio::test]
async fn the_beginning_of_an_id_stands_for_it_only_if_no_other_begins_so() -> anyhow::Result<()> {
    let pod = TestPod::run("ids").await?;
    let (cri, short) = (pod.cri.clone(), |id: &str| id[..13].to_owned());
    let (containers, alike) = two_alike(&pod).await?;
    let running = pod.start(shell("running", "sleep 1000")).await?;

    // What is ambiguous is refused, and nothing happens to any of those it could mean.
    let first = &alike[0];
    for rpc in OF_CONTAINERS {
        let status = call(cri.runtime.clone(), rpc, &first[..1]).await.expect_err(rpc);
        assert_eq!(status.code(), Code::InvalidArgument, "{rpc}: {status}");
        assert!(status.message().contains("several") && status.message().contains(&first[..1]), "{rpc}: {status}");
    }
    for id in &containers {
        assert_eq!(id.status().await?.state(), cri::ContainerState::ContainerCreated, "{}", id.id);
    }

    // Neither more than an id, nor in capitals, nor that of something else.
    for (own, other, calls) in [(&pod.id, &running.id, &OF_SANDBOXES[..]), (&running.id, &pod.id, &OF_CONTAINERS)] {
        for rpc in calls {
            finds_nothing(&cri, rpc, other).await;
            finds_nothing(&cri, rpc, &short(other)).await;
            finds_nothing(&cri, rpc, &format!("{own}0")).await;
            finds_nothing(&cri, rpc, &format!(" {own}")).await;
            finds_nothing(&cri, rpc, &own.to_uppercase()).await;
        }
    }
    assert_eq!(running.status().await?.state(), cri::ContainerState::ContainerRunning);
    assert_eq!(pod.status().await?.state(), cri::PodSandboxState::SandboxReady);

    // What is not ambiguous means the one it begins, whatever is done; those that end it come last.
    for rpc in OF_SANDBOXES.into_iter().skip(2) {
        call(cri.runtime.clone(), rpc, &short(&pod.id)).await.map_err(|status| anyhow::anyhow!("{rpc}: {status}"))?;
    }
    let of_pod = cri::ContainerFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() };
    let before = cri.containers(Some(of_pod.clone())).await?.len();
    assert_eq!(before, containers.len() + 2, "CreateContainer made one");
    for rpc in OF_CONTAINERS.into_iter().skip(3) {
        let result = call(cri.runtime.clone(), rpc, &short(&running.id)).await;
        result.map_err(|status| anyhow::anyhow!("{rpc}: {status}"))?;
    }
    call(cri.runtime.clone(), "StartContainer", &short(first)).await?;
    let started = containers.iter().find(|container| container.id == *first).expect("it is one of them");
    assert_eq!(started.status().await?.state(), cri::ContainerState::ContainerRunning);
    call(cri.runtime.clone(), "StopContainer", &short(first)).await?;
    assert_eq!(started.status().await?.state(), cri::ContainerState::ContainerExited);
    call(cri.runtime.clone(), "RemoveContainer", &short(first)).await?;
    assert!(started.status().await.is_err(), "it is removed");
    let left = cri.containers(Some(of_pod)).await?;
    assert_eq!(left.len(), before - 1);
    assert_eq!(running.status().await?.state(), cri::ContainerState::ContainerRunning);
    call(cri.runtime.clone(), "StopPodSandbox", &short(&pod.id)).await?;
    assert_eq!(pod.status().await?.state(), cri::PodSandboxState::SandboxNotready);
    call(cri.runtime.clone(), "RemovePodSandbox", &short(&pod.id)).await?;
    assert!(pod.status().await.is_err(), "it is removed");
    pod.remove().await?;
    Ok(())
}
