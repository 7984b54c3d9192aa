//! ExecSync.

use std::time::{Duration, Instant};

use isopod_tests::fixture::{TestPod, shell};
use tonic::Code;

#[tokio::test]
async fn output_and_exit_code_are_those_of_the_command() -> anyhow::Result<()> {
    let pod = TestPod::run("exec").await?;
    let container = pod.start(shell("exec", "export INNER=1; sleep 1000")).await?;
    let output = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 42"]).await?;
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code), ("out\n", "err\n", 42));
    let silent = container.exec(&["true"]).await?;
    assert_eq!((silent.stdout.as_str(), silent.stderr.as_str(), silent.code), ("", "", 0));
    let killed = container.exec(&["sh", "-c", "kill -KILL $$"]).await?;
    assert_eq!(killed.code, 137);
    // Nobody gives it input, so reading ends at once.
    assert_eq!(container.exec(&["cat"]).await?.code, 0);
    let missing = container.exec(&["/no/such/command"]).await;
    assert!(missing.as_ref().is_err_and(|status| status.message().contains("/no/such/command")), "{missing:?}");
    assert!(container.sh("cat /proc/1/comm").await.is_ok());
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_command_over_its_time_is_killed_with_all_it_started() -> anyhow::Result<()> {
    let pod = TestPod::run("timeout").await?;
    let container = pod.start(shell("timeout", "sleep 1000")).await?;
    let start = Instant::now();
    let error = container.exec_for(&["sh", "-c", "sleep 2001 & sleep 2002"], 2).await.map_err(|status| status.code());
    assert_eq!(error, Err(Code::DeadlineExceeded));
    assert!(start.elapsed() < Duration::from_secs(60), "it took {:?}", start.elapsed());
    let left = isopod_tests::fixture::eventually("end of what it started", Duration::from_secs(20), async || {
        let output = container.exec(&["ps"]).await.ok()?;
        (!output.stdout.contains("sleep 200")).then_some(())
    });
    left.await?;
    // The container itself goes on.
    assert_eq!(container.sh("echo on").await?, "on\n");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn several_megabytes_arrive_whole() -> anyhow::Result<()> {
    let pod = TestPod::run("volume").await?;
    let container = pod.start(shell("volume", "sleep 1000")).await?;
    let start = Instant::now();
    let output = container.exec(&["sh", "-c", "yes 0123456789abcde | head -c 8388608"]).await?;
    println!("8 MiB in {:?}", start.elapsed());
    assert_eq!(output.stdout.len(), 8 << 20);
    assert!(output.stdout.as_bytes().chunks(16).all(|chunk| chunk == b"0123456789abcde\n"));
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn exec_in_a_container_that_does_not_run_is_refused() -> anyhow::Result<()> {
    let pod = TestPod::run("not-running").await?;
    let container = pod.create(shell("created", "sleep 1000")).await?;
    assert!(container.exec(&["true"]).await.is_err());
    container.start().await?;
    container.stop(0).await?;
    assert!(container.exec(&["true"]).await.is_err());
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn many_at_once_do_not_mix() -> anyhow::Result<()> {
    let pod = TestPod::run("parallel").await?;
    let container = std::sync::Arc::new(pod.start(shell("parallel", "sleep 1000")).await?);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..12 {
        let container = container.clone();
        tasks.spawn(async move { (number, container.sh(&format!("sleep 0.2; echo {number}")).await) });
    }
    while let Some(result) = tasks.join_next().await {
        let (number, output) = result?;
        assert_eq!(output?, format!("{number}\n"));
    }
    pod.remove().await?;
    Ok(())
}
