//! What it takes to give a running pod more memory, and to take it back.

use std::time::{Duration, Instant};

use anyhow::Result;
use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Cri, TestPod, shell};
use isopod_tests::kvm_trace::{ExitCounter, Exits};

use super::lifecycle::median;

const SMALL: i64 = 64 << 20;
const LARGE: i64 = 512 << 20;
const RUNS: usize = 5;

/// Prints a row for each direction. Once before, so that the guest's code is in the emulator's cache.
pub async fn run() -> Result<()> {
    let cri = Cri::shared().await?;
    cri.pull(BUSYBOX).await?;
    let mut config = TestPod::config("resize");
    config.linux.get_or_insert_default().resources = Some(limit(SMALL));
    let pod = TestPod::run_with(&cri, config).await?;
    pod.start(shell("resized", "exec sleep 1000")).await?;
    let (mut grown, mut shrunk) = (vec![], vec![]);
    for round in 0..=RUNS {
        let (more, less) = (resize(&pod, LARGE).await?, resize(&pod, SMALL).await?);
        if round > 0 {
            grown.push(more);
            shrunk.push(less);
        }
    }
    pod.remove().await?;
    println!("{:<20} {:>12} {:>10} {:>14}", "limit of the pod", "ms", "VM exits", "to the VMM");
    for (name, runs) in [("64 to 512 MiB", &grown), ("512 to 64 MiB", &shrunk)] {
        let of = |what: fn(&(Duration, Exits)) -> f64| median(runs.iter().map(what).collect());
        let (time, total) = (of(|(time, _)| time.as_secs_f64() * 1e3), of(|(_, exits)| exits.total as f64));
        println!("{name:<20} {time:>12.1} {total:>10} {:>14}", of(|(_, exits)| exits.userspace as f64));
    }
    Ok(())
}

fn limit(bytes: i64) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() }
}

async fn resize(pod: &TestPod, bytes: i64) -> Result<(Duration, Exits)> {
    let request = cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        overhead: None,
        resources: Some(limit(bytes)),
    };
    let counter = ExitCounter::start()?;
    let start = Instant::now();
    pod.cri.runtime.clone().update_pod_sandbox_resources(request).await?;
    Ok((start.elapsed(), counter.read()?))
}
