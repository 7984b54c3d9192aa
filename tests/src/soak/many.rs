//! Many sandboxes at once, round after round.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use isopod_cri_server::cri;

use super::patient;
use super::pods::nothing_is_left;
use crate::fixture::{Cri, Daemon, TestPod};
use crate::process_memory::private_bytes_outside_guest;

/// Limit of a pod's memory, so that many fit into a node.
const MEMORY: i64 = 64 << 20;

/// How it went.
#[derive(Debug, Default)]
pub struct Report {
    sandboxes: usize,
    rounds: usize,
    /// The longest time that the sandboxes of a round took, all together.
    longest: Duration,
    /// Private bytes of the daemon after the first round and after the last one.
    memory: (u64, u64),
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let Self { sandboxes, rounds, longest, memory: (first, last) } = self;
        let mib = |bytes: &u64| *bytes as f64 / f64::from(1 << 20);
        write!(
            formatter,
            "many: {sandboxes} sandboxes in {rounds} rounds, the slowest round ready after {longest:.1?}; the daemon has {:.1} MiB after the \
             first round and {:.1} MiB after the last; no failure, nothing left",
            mib(first),
            mib(last)
        )
    }
}

/// Runs so many sandboxes, `at_once` of them at the same time.
pub async fn run(sandboxes: usize, at_once: usize) -> Result<Report> {
    let daemon = Daemon::start(patient).await?;
    let cri = daemon.cri().await?;
    let mut report = Report::default();
    while report.sandboxes < sandboxes {
        let count = at_once.min(sandboxes - report.sandboxes);
        let took = round(&daemon, &cri, count).await.with_context(|| format!("in round {}", report.rounds + 1))?;
        let memory = private_bytes_outside_guest(daemon.pid(), u64::MAX)?;
        if report.rounds == 0 {
            report.memory.0 = memory;
        }
        report.memory.1 = memory;
        (report.sandboxes, report.rounds) = (report.sandboxes + count, report.rounds + 1);
        report.longest = report.longest.max(took);
        println!("soak: {count} sandboxes ready after {took:.1?}; {report:?}");
    }
    let (first, last) = report.memory;
    ensure!(last < first + (8 << 20), "the daemon has grown from {first} to {last} bytes");
    Ok(report)
}

/// So many sandboxes from nothing to ready, and to nothing again. How long the first half took.
async fn round(daemon: &Daemon, cri: &Cri, count: usize) -> Result<Duration> {
    let start = Instant::now();
    let pods = try_join_all((0..count).map(|_| {
        let mut config = TestPod::config("many");
        let limits = cri::LinuxContainerResources { memory_limit_in_bytes: MEMORY, ..Default::default() };
        config.linux.get_or_insert_default().resources = Some(limits);
        TestPod::run_with(cri, config)
    }))
    .await?;
    let took = start.elapsed();
    let statuses = try_join_all(pods.iter().map(TestPod::status)).await?;
    ensure!(statuses.iter().all(|status| status.state() == cri::PodSandboxState::SandboxReady), "{statuses:?}");
    let addresses: BTreeSet<String> =
        statuses.iter().filter_map(|status| Some(status.network.as_ref()?.ip.clone())).collect();
    ensure!(addresses.len() == count, "{} addresses for {count} sandboxes", addresses.len());
    ensure!(daemon.vmms().len() == count, "{} VMMs", daemon.vmms().len());
    let ids: Vec<String> = pods.iter().map(|pod| pod.id.clone()).collect();
    try_join_all(pods.into_iter().map(TestPod::remove)).await?;
    nothing_is_left(daemon, cri, ids).await?;
    Ok(took)
}
