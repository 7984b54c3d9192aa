//! A daemon that is killed in the middle of what it does.

use std::path::PathBuf;
use std::time::Duration;

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Cri, Daemon, LogLine, TestContainer, TestPod, eventually, shell};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(60);
/// One that its pod has no other container of, so that its disk comes and goes.
const IMAGE: &str = "gcr.io/k8s-staging-cri-tools/test-image-1:latest";
/// How long after the request the daemon is killed: from before the disk is plugged in to after the start.
const DELAYS_MS: [u64; 7] = [5, 40, 120, 200, 300, 450, 800];

/// The one container with the name of `config`, as the daemon shows it.
async fn find(cri: &Cri, config: &cri::ContainerConfig) -> anyhow::Result<Option<cri::Container>> {
    let mut found = cri.containers(None).await?;
    found.retain(|container| container.metadata == config.metadata);
    assert!(found.len() <= 1, "{found:?}");
    Ok(found.pop())
}

/// Has the container run, wherever its creation and start were cut off.
async fn finish(pod: &TestPod, config: &cri::ContainerConfig) -> anyhow::Result<TestContainer> {
    let log = PathBuf::from(&pod.config.log_directory).join(&config.log_path);
    let container = match find(&pod.cri, config).await? {
        Some(found) => TestContainer { cri: pod.cri.clone(), id: found.id, log },
        None => pod.create(config.clone()).await?,
    };
    // Of a start that was cut off the daemon may still have to learn; then this one is refused.
    let _ = container.start().await;
    let status = container.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerRunning, "{status:?}");
    assert!(status.started_at >= status.created_at);
    Ok(container)
}

#[tokio::test]
async fn a_daemon_that_is_killed_over_and_over_loses_nothing_and_leaves_nothing() -> anyhow::Result<()> {
    let mut daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    cri.pull(IMAGE).await?;
    let mut pod = TestPod::run_with(&cri, TestPod::config("killed")).await?;
    let mut config = shell("printer", "n=0; while :; do n=$((n+1)); echo $n; done");
    let node = cri::NamespaceOption { pid: cri::NamespaceMode::Node.into(), ..Default::default() };
    config.linux.get_or_insert_default().security_context =
        Some(cri::LinuxContainerSecurityContext { namespace_options: Some(node), ..Default::default() });
    let mut printer = pod.start(config).await?;
    let disks = "ls /sys/block | grep -c '^vd'";
    let disks_before = printer.sh(disks).await?;
    let mut printed: Vec<LogLine> = Vec::new();

    for (round, delay) in DELAYS_MS.into_iter().enumerate() {
        let mut config = shell("cut", "echo alive; exec sleep 9876");
        config.log_path = format!("cut-{round}.log");
        config.image.get_or_insert_default().image = IMAGE.to_owned();
        // The kubelet's rotation: sometimes the daemon is killed before it is told.
        let rotated = printer.log.with_extension(format!("log.{round}"));
        std::fs::rename(&printer.log, &rotated)?;
        let start = pod.start(config.clone());
        let command = printer.exec(&["sleep", "5432"]);
        let kill = async {
            tokio::time::sleep(Duration::from_millis(delay)).await;
            daemon.end(Signal::KILL).await
        };
        let (start, command, killed) = tokio::join!(start, command, kill);
        killed?;
        assert!(command.is_err(), "its daemon was killed: {command:?}");
        drop(start); // It may have been answered before.
        daemon.restart().await?;
        let cri = daemon.cri().await?;
        (pod.cri, printer.cri) = (cri.clone(), cri);

        let container = finish(&pod, &config).await?;
        let lines = container.logged("its line", PATIENCE, |lines| !lines.is_empty()).await?;
        assert_eq!(lines.iter().map(LogLine::text).collect::<Vec<_>>(), ["alive\n"], "after {delay} ms");
        container.stop(0).await?;
        container.remove().await?;
        let new = std::mem::replace(&mut printer.log, rotated);
        printed.extend(printer.logs()?);
        printer.log = new;
    }

    // What a request had made that was cut off is gone, and so are the commands of clients that went with the daemon.
    eventually("end of what was cut off", PATIENCE, async || {
        let left = "ps -o args | grep -E 'sleep (9876|5432)' | grep -v grep";
        (printer.exec(&["sh", "-c", left]).await.ok()?.stdout.is_empty()).then_some(())
    })
    .await?;
    eventually("end of its disks", PATIENCE, async || printer.sh(disks).await.ok().filter(|now| *now == disks_before))
        .await?;
    printer.stop(0).await?;
    assert_eq!(printer.exited().await?.exit_code, 137);
    printed.extend(printer.logs()?);
    printed.pop(); // It may be cut by the kill.
    let wrong = printed.iter().zip(1..).find(|(line, number)| line.text() != format!("{number}\n"));
    assert!(wrong.is_none(), "{wrong:?}");
    assert!(printed.len() > 1000, "{}", printed.len());
    pod.remove().await?;
    assert!(daemon.vmms().is_empty());
    Ok(())
}

#[tokio::test]
async fn pods_come_and_go_while_a_daemon_and_a_vmm_are_killed() -> anyhow::Result<()> {
    // The short form of `make soak`: a round for each.
    println!("{}", isopod_tests::soak::pods::run(Duration::ZERO, 2).await?);
    Ok(())
}

#[tokio::test]
async fn sandboxes_that_are_made_at_once_are_each_ones_own() -> anyhow::Result<()> {
    println!("{}", isopod_tests::soak::many::run(6, 3).await?);
    Ok(())
}
