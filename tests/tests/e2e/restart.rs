//! The daemon ends and comes back: pods live on, and what it said before is still true.

use std::time::Duration;

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Build, Daemon, TestPod, eventually, shell, unique};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_stopped_daemon_ends_with_0() -> anyhow::Result<()> {
    let mut daemon = Daemon::start(|_| ()).await?;
    let status = daemon.end(Signal::TERM).await?;
    assert!(status.success(), "{status}: {}", daemon.log());
    Ok(())
}

#[tokio::test]
async fn a_daemon_that_is_told_to_end_answers_first_and_leaves_its_pods() -> anyhow::Result<()> {
    let mut daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let mut pod = TestPod::run_with(&cri, TestPod::config("drained")).await?;
    let mut container = pod.start(shell("drained", "exec sleep 1000")).await?;
    let (pod_before, before) = (pod.status().await?, container.status().await?);
    let ask = |script: &'static str| {
        let container = container.clone();
        tokio::spawn(async move { container.exec(&["sh", "-c", script]).await })
    };
    let (short, long) = (ask("sleep 5; echo answered"), ask("exec sleep 5432"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let status = daemon.end(Signal::TERM).await?;
    assert!(status.success(), "{status}: {}", daemon.log());
    assert_eq!(short.await??.stdout, "answered\n");
    assert!(long.await?.is_err(), "it would have held the daemon up");

    daemon.restart().await?;
    let cri = daemon.cri().await?;
    (pod.cri, container.cri) = (cri.clone(), cri);
    assert_eq!((pod.status().await?, container.status().await?), (pod_before, before));
    eventually("end of what was cut off", PATIENCE, async || {
        (container.sh("ps -o args | grep 'sleep 543[2]' || true").await.ok()?.is_empty()).then_some(())
    })
    .await?;
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn after_a_reboot_of_the_node_the_truth_is_told_and_pods_can_be_made_anew() -> anyhow::Result<()> {
    let mut daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let config = TestPod::config("rebooted");
    let mut pod = TestPod::run_with(&cri, config.clone()).await?;
    let mut ended = pod.start(shell("ended", "exit 7")).await?;
    let mut running = pod.start(shell("running", "echo before; exec sleep 1000")).await?;
    let ended_before = ended.exited().await?;
    running.logged("its line", PATIENCE, |lines| !lines.is_empty()).await?;

    daemon.lose_node().await?;
    daemon.restart().await?;
    let cri = daemon.cri().await?;
    for client in [&mut pod.cri, &mut ended.cri, &mut running.cri] {
        *client = cri.clone();
    }
    assert_eq!(pod.status().await?.state(), cri::PodSandboxState::SandboxNotready);
    assert_eq!(ended.status().await?, ended_before);
    let status = running.status().await?;
    assert_eq!((status.state(), status.exit_code), (cri::ContainerState::ContainerExited, 137), "{status:?}");
    assert_eq!(status.reason, "Error");
    assert_eq!(running.logs()?.len(), 1);
    assert!(cri.image(BUSYBOX).await?.is_some());

    // The kubelet's next attempt, made while the former one is still there.
    let mut again = config;
    again.metadata.get_or_insert_default().attempt = 1;
    let second = TestPod::run_with(&cri, again).await?;
    assert_eq!(second.script("echo after").await?, "after\n");
    pod.stop().await?;
    pod.remove().await?;
    assert_eq!(second.script("echo still").await?, "still\n");
    second.remove().await?;
    let held = daemon.holdings()?;
    assert!(held.is_empty(), "left: {held:?}");
    Ok(())
}

#[tokio::test]
async fn images_and_pods_are_still_known_after_a_crash_of_the_daemon() -> anyhow::Result<()> {
    let volume = std::path::PathBuf::from(format!("/tmp/{}", unique("restart")));
    std::fs::create_dir(&volume)?;
    let mut daemon = Daemon::start(|_| ()).await?;
    let mut cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let mut pod = TestPod::run_with(&cri, TestPod::config("survivor")).await?;
    let mut config = shell(
        "survivor",
        "n=0; while :; do n=$((n+1)); echo $n; echo $n >/volume/m; mv /volume/m /volume/n; sleep 0.2; done",
    );
    config.mounts = vec![cri::Mount {
        host_path: volume.display().to_string(),
        container_path: "/volume".to_owned(),
        ..Default::default()
    }];
    let mut container = pod.start(config.clone()).await?;
    let count = || std::fs::read_to_string(volume.join("n")).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let reaches = async |least: u32| {
        eventually("a higher number", PATIENCE, async || count().filter(|count| *count >= least)).await
    };
    reaches(3).await?;
    let (pod_before, before, image) = (pod.status().await?, container.status().await?, cri.image(BUSYBOX).await?);
    daemon.end(Signal::KILL).await?;
    // It goes on without a daemon, and so does the server of its volume.
    let at_the_end = count().unwrap_or_default();
    let meanwhile = reaches(at_the_end + 5).await?;
    daemon.restart().await?;

    cri = daemon.cri().await?;
    (pod.cri, container.cri) = (cri.clone(), cri.clone());
    assert_eq!(cri.image(BUSYBOX).await?, image);
    assert_eq!(pod.status().await?, pod_before);
    assert_eq!(container.status().await?, before);
    assert!(container.sh("cat /volume/n").await?.trim().parse::<u32>()? >= meanwhile);
    // Another one can have the same volume.
    let second = cri::ContainerConfig { mounts: config.mounts, ..shell("second", "test -e /volume/n") };
    let (end, _) = pod.run_to_end(second).await?;
    assert_eq!(end.exit_code, 0);
    // Every line is in the log, also those that were printed while nobody read.
    let last = reaches(meanwhile + 3).await?;
    let lines = container.logged("the lines of the log", PATIENCE, |lines| lines.len() >= last as usize).await?;
    let numbers = lines.iter().map(|line| line.text().trim().parse::<u32>()).collect::<Result<Vec<_>, _>>()?;
    assert!(numbers.iter().copied().eq(1..=numbers.len() as u32), "{numbers:?}");
    container.stop(0).await?;
    assert_eq!(container.status().await?.exit_code, 137);

    // It can be removed, and then nothing of it is left.
    pod.remove().await?;
    assert!(cri.sandboxes(None).await?.is_empty());
    std::fs::remove_dir_all(volume)?;
    Ok(())
}

#[tokio::test]
async fn pods_serve_write_and_end_while_their_daemon_is_replaced() -> anyhow::Result<()> {
    println!("{}", isopod_tests::soak::restart::run(4, Build::here()?, Signal::KILL).await?);
    Ok(())
}
