//! The daemon ends and comes back: pods live on, and what it said before is still true.

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Daemon, TestPod, shell};
use rustix::process::Signal;

#[tokio::test]
async fn a_stopped_daemon_ends_with_0() -> anyhow::Result<()> {
    let mut daemon = Daemon::start(|_| ()).await?;
    let status = daemon.end(Signal::TERM).await?;
    assert!(status.success(), "{status}: {}", daemon.log());
    Ok(())
}

#[tokio::test]
async fn images_and_pods_are_still_known_after_a_crash_of_the_daemon() -> anyhow::Result<()> {
    let mut daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let pod = TestPod::run_with(&cri, TestPod::config("survivor")).await?;
    let container = pod.start(shell("survivor", "sleep 1000")).await?;
    let (before, image) = (pod.status().await?, cri.image(BUSYBOX).await?);
    daemon.end(Signal::KILL).await?;
    daemon.restart().await?;

    let cri = daemon.cri().await?;
    assert_eq!(cri.image(BUSYBOX).await?, image);
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    let after = cri.runtime.clone().pod_sandbox_status(request).await?.into_inner().status.unwrap_or_default();
    assert_eq!((after.metadata, after.created_at, after.network), (before.metadata, before.created_at, before.network));
    let request = cri::ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
    let status = cri.runtime.clone().container_status(request).await?.into_inner().status.unwrap_or_default();
    assert_ne!(status.state(), cri::ContainerState::ContainerCreated);

    // It can be removed, and then nothing of it is left.
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
    cri.runtime.clone().remove_pod_sandbox(request).await?;
    assert!(cri.sandboxes(None).await?.is_empty());
    Ok(())
}
