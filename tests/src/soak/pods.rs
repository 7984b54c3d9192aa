//! Pods that come and go while VMMs and the daemon are killed at random.
//!
//! A round is some pods at once, each from its creation to its removal, by a client that asks again as the kubelet does when its
//! call is cut off. One thing is killed in each round. All must be as if nothing had happened, but for the pod whose VMM it was, which
//! must be told of as what it is. After each round nothing may be left on the node.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::join_all;
use isopod_cri_server::cri;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;

use super::pod_life::{self, World, sandbox_status_of};
use crate::fixture::{BUSYBOX, Cri, Daemon, eventually, vmms_below};
use crate::process_memory::private_bytes_outside_guest;

/// Pods of a round, as many as an emulated node of 3 GiB has memory for.
pub const AT_ONCE: usize = 5;
/// Within this from the beginning of a round something is killed; a round takes somewhat longer.
const ROUND: Duration = Duration::from_secs(40);
/// How long a sandbox may be shown as ready after its VMM was killed, on an emulated machine under load.
const NOTICE: Duration = Duration::from_secs(10);
/// Private bytes of a daemon after a round: twice what it has after its first.
const MOST_MEMORY: u64 = 40 << 20;

/// What was done, and how it went.
#[derive(Debug, Default)]
pub struct Report {
    rounds: u32,
    pods: usize,
    daemons_killed: u32,
    vmms_killed: u32,
    /// From the kill of a VMM to the end of its process, which takes the kernel a while when the CPU is busy.
    ended: Vec<Duration>,
    /// From there to its sandbox being shown as not ready.
    noticed: Vec<Duration>,
    /// From the start of a daemon to its first answer, with the pods of a round.
    restarts: Vec<Duration>,
    /// Private bytes of the daemon at the end.
    memory: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let longest = |times: &[Duration]| times.iter().max().copied().unwrap_or_default().as_millis();
        let Self { rounds, pods, daemons_killed, vmms_killed, ended, noticed, restarts, memory } = self;
        write!(
            formatter,
            "pods: {pods} in {rounds} rounds, {vmms_killed} VMMs and {daemons_killed} daemons killed; a killed VMM gone within {} ms, and \
             noticed within {} ms after that; a daemon back within {} ms; {:.1} MiB at the end; no other failure, nothing left",
            longest(ended),
            longest(noticed),
            longest(restarts),
            *memory as f64 / f64::from(1 << 20),
        )
    }
}

/// Numbers that look random (xorshift); the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Rounds for `duration`, at least one for each thing that is killed.
pub async fn run(duration: Duration, at_once: usize) -> Result<Report> {
    let seed = std::process::id().into();
    println!("soak: the seed is {seed}");
    let mut random = Random(seed);
    for _ in 0..20 {
        random.below(1); // The first ones of a small seed are small.
    }
    let mut daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let world = World::new(cri);
    let mut report = Report::default();
    let start = Instant::now();
    while start.elapsed() < duration || report.daemons_killed == 0 || report.vmms_killed == 0 {
        let after = Duration::from_millis(random.below(ROUND.as_millis() as u64));
        let choice = random.below(1 << 32) as usize;
        let over = AtomicBool::new(false);
        let pods = async {
            let pods = join_all((0..at_once).map(|_| pod_life::live(&world))).await;
            over.store(true, Ordering::Relaxed);
            pods
        };
        let kill = async {
            sleep(after).await;
            if report.rounds % 2 == 0 {
                kill_daemon(&mut daemon, &world, &mut report).await
            } else {
                kill_vmm(&daemon, &world, &mut report, choice, &over).await
            }
        };
        let (pods, killed) = tokio::join!(pods, kill);
        killed?;
        pods.into_iter().collect::<Result<()>>()?;
        report.rounds += 1;
        report.pods += at_once;
        nothing_is_left(&daemon, &world.cri().await, world.take_ids().await).await?;
        report.memory = private_bytes_outside_guest(daemon.pid(), u64::MAX)?;
        println!("soak: round {} after {:?}: {report:?}", report.rounds, start.elapsed());
        ensure!(report.memory <= MOST_MEMORY, "the daemon has {} bytes without a pod", report.memory);
    }
    Ok(report)
}

async fn kill_daemon(daemon: &mut Daemon, world: &World, report: &mut Report) -> Result<()> {
    daemon.end(Signal::KILL).await?;
    let start = Instant::now();
    daemon.restart().await?;
    report.restarts.push(start.elapsed());
    report.daemons_killed += 1;
    world.reconnect(daemon.cri().await?).await;
    Ok(())
}

/// Kills the VMM of a sandbox, as soon as there is one; none if the round is over before.
async fn kill_vmm(daemon: &Daemon, world: &World, report: &mut Report, choice: usize, over: &AtomicBool) -> Result<()> {
    let found = eventually("sandbox that is ready", ROUND, async || {
        if over.load(Ordering::Relaxed) {
            return Some(None);
        }
        let mut sandboxes = world.cri().await.sandboxes(None).await.ok()?;
        sandboxes.retain(|sandbox| sandbox.state() == cri::PodSandboxState::SandboxReady);
        let id = sandboxes.get(choice % sandboxes.len().max(1))?.id.clone();
        let directory = daemon.state.join("sandboxes").join(&id[..12]);
        Some(Some((id, vmms_below(&directory).pop()?)))
    })
    .await?;
    let Some((id, vmm)) = found else { return Ok(()) };
    world.doom(&id).await;
    // It may be stopped at this moment by its own client.
    let Ok(killed) = Killed::kill(&vmm) else { return Ok(()) };
    eventually("end of a sandbox whose VMM was killed", NOTICE, async || {
        match world.cri().await.runtime.pod_sandbox_status(sandbox_status_of(&id)).await {
            Ok(answer) => (answer.into_inner().status?.state() == cri::PodSandboxState::SandboxNotready).then_some(()),
            // Its client has removed it in the meantime.
            Err(status) => (status.code() == tonic::Code::NotFound).then_some(()),
        }
    })
    .await?;
    let noticed = Instant::now();
    let (killed, ended) = killed.ended().await?;
    report.ended.push(ended - killed);
    report.noticed.push(noticed.saturating_duration_since(ended));
    report.vmms_killed += 1;
    Ok(())
}

/// A process that was killed.
struct Killed {
    at: Instant,
    end: JoinHandle<Result<Instant>>,
}

impl Killed {
    /// Kills the process of this directory in /proc.
    fn kill(process: &Path) -> Result<Self> {
        let pid = process.file_name().and_then(|name| name.to_str()).context("a process")?.parse()?;
        let pidfd = pidfd_open(Pid::from_raw(pid).context("a process")?, PidfdFlags::empty())?;
        pidfd_send_signal(&pidfd, Signal::KILL)?;
        let at = Instant::now();
        let end = spawn_blocking(move || {
            let timeout = Timespec { tv_sec: NOTICE.as_secs() as i64, tv_nsec: 0 };
            let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout))?;
            ensure!(ready == 1, "a killed VMM does not end");
            Ok(Instant::now())
        });
        Ok(Self { at, end })
    }

    /// When it was killed, and when it had ended.
    async fn ended(self) -> Result<(Instant, Instant)> {
        Ok((self.at, self.end.await??))
    }
}

/// All pods are removed: the daemon shows none, and the node has nothing of one.
pub(super) async fn nothing_is_left(daemon: &Daemon, cri: &Cri, ids: Vec<String>) -> Result<()> {
    let (sandboxes, containers) = (cri.sandboxes(None).await?, cri.containers(None).await?);
    ensure!(sandboxes.is_empty() && containers.is_empty(), "still there: {sandboxes:?} {containers:?}");
    let held = daemon.holdings()?;
    ensure!(held.is_empty(), "left: {held:?}");
    for id in ids {
        ensure!(!Path::new("/sys/fs/cgroup/isopod").join(format!("isopod-{id}")).exists(), "left: the cgroup of {id}");
    }
    let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.pid()))?.count();
    ensure!(descriptors < 100, "the daemon has {descriptors} descriptors open without a pod");
    Ok(())
}
