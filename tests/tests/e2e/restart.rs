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
    println!("{}", isopod_tests::soak::restart::run(4, Build::here()?).await?);
    Ok(())
}
