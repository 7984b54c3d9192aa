//! What it takes to have an image's file system in a guest: the disk is plugged in, verified and mounted, and a container made on it.

use std::time::{Duration, Instant};

use anyhow::Result;
use isopod_tests::fixture::{BUSYBOX, Cri, TestPod, shell};
use isopod_tests::kvm_trace::{ExitCounter, Exits};

use super::lifecycle::median;

/// With the files of [`BUSYBOX`] and 126 more layers.
const DEEP: &str = "docker.io/isopod/deep:latest";
const RUNS: usize = 5;

/// One CreateContainer.
struct Run {
    time: Duration,
    exits: Exits,
}

/// Prints a row for an image of one layer and one for an image of 127. Both are mounted once before, so that the guest's code is in the
/// emulator's cache, and then in turn, each as the only container of that image in its pod.
pub async fn run() -> Result<()> {
    let cri = Cri::shared().await?;
    let images = [("1 layer", BUSYBOX), ("127 layers", DEEP)];
    for (_, image) in images {
        cri.pull(image).await?;
    }
    let pod = TestPod::run("mount").await?;
    let mut runs = [vec![], vec![]];
    for round in 0..=RUNS {
        for ((_, image), runs) in images.iter().zip(&mut runs) {
            let run = create(&pod, image).await?;
            if round > 0 {
                runs.push(run);
            }
        }
    }
    pod.remove().await?;
    println!("{:<12} {:>12} {:>10} {:>14}", "image", "ms", "VM exits", "to the VMM");
    for ((name, _), runs) in images.iter().zip(&runs) {
        let of = |what: fn(&Run) -> f64| median(runs.iter().map(what).collect());
        let (time, total) = (of(|run| run.time.as_secs_f64() * 1e3), of(|run| run.exits.total as f64));
        println!("{name:<12} {time:>12.1} {total:>10} {:>14}", of(|run| run.exits.userspace as f64));
    }
    Ok(())
}

async fn create(pod: &TestPod, image: &str) -> Result<Run> {
    let mut config = shell("mounted", "true");
    config.image.get_or_insert_default().image = image.to_owned();
    let counter = ExitCounter::start()?;
    let start = Instant::now();
    let container = pod.create(config).await?;
    let (time, exits) = (start.elapsed(), counter.read()?);
    drop(counter);
    // Its disk goes with it.
    container.remove().await?;
    Ok(Run { time, exits })
}
