//! A container that prints without end, whose log is rotated all the time, beside the shared daemon. Every line of every rotated file is looked at: it must be the one after the line
//! before. The daemon's memory must not grow once it has been at it for a while.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use isopod_cri_server::cri;

use crate::fixture::{LogLine, TestContainer, TestPod, setting, shell};
use crate::process_memory::private_bytes_outside_guest;

/// How often the log is rotated.
const ROTATION: Duration = Duration::from_secs(2);
/// From when on the daemon is not to grow: by then it has allocated what it works with.
const WARM_UP: Duration = Duration::from_secs(30);
/// What it may grow nevertheless: pages that the allocator has taken and not given back.
const SLACK: u64 = 2 << 20;

/// What has been seen of the log.
#[derive(Debug, Default)]
struct Seen {
    /// The number on the last line; they begin with 1.
    last: u64,
    bytes: u64,
}

impl Seen {
    fn add(&mut self, lines: &[LogLine]) -> Result<()> {
        for line in lines {
            let text = std::str::from_utf8(&line.content)?;
            ensure!(!line.partial && text.parse() == Ok(self.last + 1), "{text:?} comes after {}", self.last);
            self.last += 1;
            self.bytes += text.len() as u64 + 1;
        }
        Ok(())
    }
}

/// Runs for so long, more than half a minute.
pub async fn run(duration: Duration) -> Result<()> {
    let daemon: u32 = setting("ISOPOD_DAEMON_PID")?.parse()?;
    let pod = TestPod::run("soak").await?;
    // As fast as `yes`, and each line tells its place.
    let mut container = pod.start(shell("soak", "seq 1 1000000000000")).await?;
    let memory = || private_bytes_outside_guest(daemon, u64::MAX);
    let (start, mut seen, mut rotations) = (Instant::now(), Seen::default(), 0u32);
    let (mut warm, mut most) = (None, 0);
    while start.elapsed() < duration {
        tokio::time::sleep(ROTATION).await;
        seen.add(&rotate(&pod, &mut container).await?)?;
        rotations += 1;
        let now = memory()?;
        if start.elapsed() > WARM_UP {
            warm.get_or_insert(now);
            most = now.max(most);
        }
    }
    container.stop(0).await?;
    let end = container.exited().await?;
    ensure!(end.exit_code == 137, "it ended by itself: {end:?}");
    let rest = container.logs()?;
    // The last line may be cut in its middle by the kill.
    seen.add(&rest[..rest.len().saturating_sub(1)])?;
    pod.remove().await?;
    let warm = warm.context("it must run for more than half a minute")?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("log: {:.0} MiB in {} lines, {rotations} rotations, none lost or doubled", mib(seen.bytes), seen.last);
    println!("daemon: {:.1} MiB after {WARM_UP:?}, then {:.1} MiB at most", mib(warm), mib(most));
    ensure!(most <= warm + SLACK, "the daemon has grown");
    Ok(())
}

/// Renames the log as the kubelet does, has it opened anew, and takes the old one's lines.
async fn rotate(pod: &TestPod, container: &mut TestContainer) -> Result<Vec<LogLine>> {
    let rotated = container.log.with_extension("rotated");
    std::fs::rename(&container.log, &rotated)?;
    let request = cri::ReopenContainerLogRequest { container_id: container.id.clone() };
    pod.cri.runtime.clone().reopen_container_log(request).await?;
    let new = std::mem::replace(&mut container.log, rotated);
    let lines = container.logs()?;
    std::fs::remove_file(std::mem::replace(&mut container.log, new))?;
    Ok(lines)
}
