//! Container logs in the kubelet's format.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Cri, Daemon, LogLine, TestContainer, TestPod, eventually, shell};

#[tokio::test]
async fn lines_of_both_streams_are_complete_when_the_container_has_exited() -> anyhow::Result<()> {
    let pod = TestPod::run("log").await?;
    let (_, lines) = pod.run_to_end(shell("log", "echo one; echo two >&2; echo; printf 'no end'")).await?;
    let stdout: Vec<String> = lines.iter().filter(|line| line.stream == "stdout").map(LogLine::text).collect();
    let stderr: Vec<String> = lines.iter().filter(|line| line.stream == "stderr").map(LogLine::text).collect();
    assert_eq!(stdout, ["one\n", "\n", "no end"]);
    assert_eq!(stderr, ["two\n"]);
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_long_line_is_split_into_partial_entries() -> anyhow::Result<()> {
    let pod = TestPod::run("long").await?;
    let (_, lines) = pod.run_to_end(shell("long", "head -c 40000 /dev/zero | tr '\\0' x; echo; echo short")).await?;
    let sizes: Vec<(usize, bool)> = lines.iter().map(|line| (line.content.len(), line.partial)).collect();
    assert_eq!(sizes, [(16384, true), (16384, true), (7232, false), (5, false)]);
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn much_output_arrives_in_order_and_whole() -> anyhow::Result<()> {
    let pod = TestPod::run("much").await?;
    let (status, lines) = pod.run_to_end(shell("much", "seq 1 20000")).await?;
    assert_eq!(status.exit_code, 0);
    let numbers: Vec<String> = lines.iter().map(LogLine::text).collect();
    assert_eq!(numbers.len(), 20000);
    assert!(numbers.iter().enumerate().all(|(index, text)| *text == format!("{}\n", index + 1)));
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_container_without_a_log_path_runs() -> anyhow::Result<()> {
    let cri = isopod_tests::fixture::Cri::shared().await?;
    cri.pull(isopod_tests::fixture::BUSYBOX).await?;
    let mut config = TestPod::config("no-log");
    config.log_directory.clear();
    let pod = TestPod::run_with(&cri, config).await?;
    let container = pod.start(shell("no-log", "seq 1 10000; exit 4")).await?;
    assert_eq!(container.exited().await?.exit_code, 4);
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn lines_appear_while_the_container_runs() -> anyhow::Result<()> {
    let pod = TestPod::run("live").await?;
    let container = pod.start(shell("live", "echo first; sleep 1000")).await?;
    let lines = container.logged("first line", Duration::from_secs(30), |lines| !lines.is_empty()).await?;
    assert_eq!(lines[0].text(), "first\n");
    pod.remove().await?;
    Ok(())
}

/// Renames the log as the kubelet does, and has it opened anew.
async fn rotate(cri: &Cri, container: &TestContainer, number: usize) -> anyhow::Result<PathBuf> {
    let rotated = container.log.with_extension(format!("log.{number}"));
    std::fs::rename(&container.log, &rotated)?;
    let request = cri::ReopenContainerLogRequest { container_id: container.id.clone() };
    cri.runtime.clone().reopen_container_log(request).await?;
    anyhow::ensure!(container.log.exists(), "the new log is not there when the call returns");
    Ok(rotated)
}

#[tokio::test]
async fn rotation_under_load_neither_loses_nor_doubles_a_line() -> anyhow::Result<()> {
    let pod = TestPod::run("rotate").await?;
    let mut container = pod.start(shell("rotate", "seq 1 150000")).await?;
    let mut files = Vec::new();
    while container.status().await?.state() == cri::ContainerState::ContainerRunning && files.len() < 200 {
        match rotate(&pod.cri, &container, files.len()).await {
            Ok(rotated) => files.push(rotated),
            // It ended just now.
            Err(error) if container.status().await?.state() == cri::ContainerState::ContainerExited => {
                // The call that failed must not have made a new file; the lines are in the renamed one.
                let rotated = container.log.with_extension(format!("log.{}", files.len()));
                anyhow::ensure!(rotated.exists() && !container.log.exists(), "{error}");
                files.push(rotated);
            }
            Err(error) => return Err(error),
        }
    }
    assert_eq!(container.exited().await?.exit_code, 0);
    assert!(files.len() > 3, "only {} rotations happened while it ran", files.len());
    if container.log.exists() {
        files.push(container.log.clone());
    }
    let mut next = 1;
    for file in files {
        container.log = file;
        for line in container.logs()? {
            assert_eq!(line.text(), format!("{next}\n"), "in {}", container.log.display());
            next += 1;
        }
    }
    assert_eq!(next, 150_001);
    pod.remove().await?;
    Ok(())
}

/// Anonymous memory of a process in KiB.
fn anonymous_kib(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[tokio::test]
async fn a_flood_of_output_leaves_the_daemons_memory_flat() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let pod = TestPod::run_with(&cri, TestPod::config("flood")).await?;
    // Its first megabyte warms up what the daemon keeps anyway.
    let container = pod
        .start(shell(
            "flood",
            "line=$(printf %01000d 0); yes $line | head -c 1000000; sleep 3; yes $line | head -c 20000000",
        ))
        .await?;
    eventually("first megabyte", Duration::from_secs(60), async || {
        std::fs::metadata(&container.log).ok().filter(|log| log.len() > 1_000_000)
    })
    .await?;
    let before = anonymous_kib(daemon.pid())?;
    let mut most = before;
    while container.status().await?.state() == cri::ContainerState::ContainerRunning {
        most = most.max(anonymous_kib(daemon.pid())?);
        // The disk is not what this is about.
        std::fs::OpenOptions::new().write(true).open(&container.log)?.set_len(0)?;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(container.exited().await?.exit_code, 0);
    assert!(most < before + 8 * 1024, "{before} KiB before, {most} KiB at most");
    pod.remove().await?;
    Ok(())
}
