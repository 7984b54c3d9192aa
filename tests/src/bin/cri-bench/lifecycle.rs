//! Pods and containers from run to remove, and commands in them.

use std::time::Instant;

use anyhow::Result;
use isopod_tests::fixture::{BUSYBOX, Cri, TestPod, shell};

use super::Figure;

const PODS: usize = 5;
const COMMANDS: usize = 50;

pub async fn measure(cri: &Cri) -> Result<Vec<Figure>> {
    cri.pull(BUSYBOX).await?;
    // The first one of each runtime warms caches that no later pod of a node pays for.
    life(cri).await?;
    let mut lives = Vec::new();
    for _ in 0..PODS {
        lives.push(life(cri).await?);
    }
    let of = |step: usize| median(lives.iter().map(|life| life[step]).collect());
    let (p50, p99) = commands(cri).await?;
    Ok(vec![
        Figure::millis("RunPodSandbox, median of 5", of(0)),
        Figure::millis("CreateContainer", of(1)),
        Figure::millis("StartContainer", of(2)),
        Figure::millis("StopPodSandbox, with the container", of(3)),
        Figure::millis("RemovePodSandbox", of(4)),
        Figure::millis("pod and container, from nothing to running", of(0) + of(1) + of(2)),
        Figure::millis("ExecSync of true, p50 of 50", p50),
        Figure::millis("ExecSync of true, p99 of 50", p99),
    ])
}

/// Milliseconds of each step.
async fn life(cri: &Cri) -> Result<[f64; 5]> {
    let mut steps = [0.0; 5];
    let mut clock = Instant::now();
    let mut lap = |step: usize| {
        steps[step] = clock.elapsed().as_secs_f64() * 1e3;
        clock = Instant::now();
    };
    let pod = TestPod::run_with(cri, TestPod::config("bench")).await?;
    lap(0);
    let container = pod.create(shell("bench", "exec sleep 1000")).await?;
    lap(1);
    container.start().await?;
    lap(2);
    pod.stop().await?;
    lap(3);
    pod.remove().await?;
    lap(4);
    Ok(steps)
}

async fn commands(cri: &Cri) -> Result<(f64, f64)> {
    let pod = TestPod::run_with(cri, TestPod::config("bench-exec")).await?;
    let container = pod.start(shell("bench", "exec sleep 1000")).await?;
    container.exec(&["true"]).await?;
    let mut times = Vec::new();
    for _ in 0..COMMANDS {
        let start = Instant::now();
        let output = container.exec(&["true"]).await?;
        anyhow::ensure!(output.code == 0, "true ended with {}", output.code);
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    pod.remove().await?;
    times.sort_by(f64::total_cmp);
    Ok((times[COMMANDS / 2], times[COMMANDS * 99 / 100]))
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
