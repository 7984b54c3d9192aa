//! Container logs in the kubelet's format.

use std::time::Duration;

use isopod_tests::fixture::{LogLine, TestPod, eventually, shell};

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
    let lines = eventually("first line", Duration::from_secs(30), async || {
        container.logs().ok().filter(|lines| !lines.is_empty())
    })
    .await?;
    assert_eq!(lines[0].text(), "first\n");
    pod.remove().await?;
    Ok(())
}
