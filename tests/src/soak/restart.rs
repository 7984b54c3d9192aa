//! A daemon that is ended and started anew while pods serve, write and end.
//!
//! Every pod writes numbered lines; one in four also serves HTTP and is asked all the time, one in four has a container that ends while
//! there is no daemon, one in four has a command run in it as the daemon ends. None of them may notice, and what the new
//! daemon says must be what the old one said, or would have. The old one may be of another build, as in an upgrade.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use isopod_cri_server::cri;
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::patient;
use crate::fixture::{BUSYBOX, Build, Cri, Daemon, TestContainer, TestPod, eventually, shell};

/// How long a pod may take to do what is waited for, on an emulated machine with many pods.
const PATIENCE: Duration = Duration::from_secs(120);
/// Limit of a pod's memory, so that many fit into a node.
const MEMORY: i64 = 64 << 20;
/// How long there is no daemon.
const AWAY: Duration = Duration::from_secs(5);
/// How long a container may take to accept a connection.
const ACCEPT: Duration = Duration::from_secs(10);
/// Commands at the same time, of which an emulated CPU runs each within its deadline.
const AT_ONCE: usize = 10;
/// How far the clocks of node and guest may be apart, one of which tells whole seconds.
const CLOCKS: Duration = Duration::from_secs(2);
/// From a container's last word to its end, where fifty guests have one CPU.
const LAST: Duration = Duration::from_secs(10);
/// Lines that all writers write a second, and requests that all servers get a second, at most: a node with more pods has no more to do.
const RATE: f64 = 10.0;
const SERVE: &str = "mkdir -p /www && echo served >/www/index.html && exec httpd -f -p 8080 -h /www";
/// Ends as soon as somebody connects, and tells when that was, in seconds since 1970.
const END: &str = "nc -l -p 9000 -e /bin/true; date +%s; exit 7";

/// Writes a numbered line every so many seconds.
fn write(pause: f64) -> String {
    format!("n=0; while :; do n=$((n+1)); echo $n; sleep {pause:.2}; done")
}

/// How it went.
#[derive(Debug)]
pub struct Report {
    pods: usize,
    /// From the start of the new daemon to its first answer.
    answered: Duration,
    /// From there to a command having been run in every pod.
    adopted: Duration,
    /// What the servers were asked, all the while.
    requests: u64,
    /// Lines in all logs.
    lines: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let Self { pods, answered, adopted, requests, lines } = self;
        write!(
            formatter,
            "restart: {pods} pods; the new daemon answers after {} ms and has run a command in each after {} ms more; {requests} requests, \
             none failed; {lines} lines, none lost or doubled",
            answered.as_millis(),
            adopted.as_millis()
        )
    }
}

/// A pod, and what is known of it before.
struct Running {
    pod: TestPod,
    before: cri::PodSandboxStatus,
    writer: TestContainer,
    writer_before: cri::ContainerStatus,
    used_before: Used,
    other: Option<Other>,
}

/// Of a container's statistics what only ever grows in these pods.
#[derive(Clone, Copy, Debug)]
struct Used {
    cpu_nanos: u64,
    /// Of its root file system.
    disk_bytes: u64,
}

async fn used(container: &TestContainer) -> Result<Used> {
    let request = cri::ContainerStatsRequest { container_id: container.id.clone() };
    // A guest that does not get to its answer within ten seconds, as on a node with so many, is asked again.
    let stats = eventually("statistics", PATIENCE, async || {
        container.cri.runtime.clone().container_stats(request.clone()).await.ok()?.into_inner().stats
    })
    .await?;
    let number = |value: Option<cri::UInt64Value>| value.map(|value| value.value).context("a statistic is missing");
    Ok(Used {
        cpu_nanos: number(stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds))?,
        disk_bytes: number(stats.writable_layer.and_then(|layer| layer.used_bytes))?,
    })
}

enum Other {
    Serving(Clients),
    Ending(Box<TestContainer>),
    Executing,
}

impl Running {
    /// Pod `number` of so many.
    async fn start(cri: &Cri, number: usize, pods: usize) -> Result<Self> {
        let pause = pods as f64 / RATE;
        let mut config = TestPod::config("restarted");
        let limits = cri::LinuxContainerResources { memory_limit_in_bytes: MEMORY, ..Default::default() };
        config.linux.get_or_insert_default().resources = Some(limits);
        let pod = TestPod::run_with(cri, config).await?;
        let address = pod.address().await?;
        let writer = pod.start(shell("writer", &write(pause))).await?;
        let other = match number % 4 {
            0 => {
                pod.start(shell("server", SERVE)).await?;
                Some(Other::Serving(Clients::start(format!("{address}:8080"), pause / 4.0).await?))
            }
            1 => Some(Other::Ending(Box::new(pod.start(shell("ending", END)).await?))),
            2 => Some(Other::Executing),
            _ => None,
        };
        let (before, writer_before, used_before) = (pod.status().await?, writer.status().await?, used(&writer).await?);
        Ok(Self { pod, before, writer, writer_before, used_before, other })
    }

    fn reconnect(&mut self, cri: &Cri) {
        (self.pod.cri, self.writer.cri) = (cri.clone(), cri.clone());
        if let Some(Other::Ending(container)) = &mut self.other {
            container.cri = cri.clone();
        }
    }

    /// What the new daemon says of it is what the old one said.
    async fn is_the_same(&self) -> Result<()> {
        let (pod, writer) = (self.pod.status().await?, self.writer.status().await?);
        ensure!(pod == self.before, "{pod:?} was {:?}", self.before);
        ensure!(writer == self.writer_before, "{writer:?} was {:?}", self.writer_before);
        let (used, before) = (used(&self.writer).await?, self.used_before);
        ensure!(used.cpu_nanos > before.cpu_nanos, "it writes all the while, and {used:?} was {before:?}");
        ensure!(used.disk_bytes >= before.disk_bytes, "{used:?} was {before:?}");
        Ok(())
    }

    /// Ends what runs in it, and returns how many lines it wrote and how many requests it answered.
    async fn end(self) -> Result<(usize, u64)> {
        let lines = self.writer.logs()?.len();
        self.writer.logged("more lines", PATIENCE, |now| now.len() > lines).await?;
        self.writer.stop(0).await?;
        ensure!(self.writer.exited().await?.exit_code == 137, "the writer");
        let mut lines = self.writer.logs()?;
        lines.pop(); // It may be cut by the kill.
        let wrong = lines.iter().zip(1..).find(|(line, number)| line.text() != format!("{number}\n"));
        ensure!(wrong.is_none(), "in the log of {}: {wrong:?}", self.writer.id);
        let requests = match self.other {
            Some(Other::Serving(clients)) => clients.stop().await?,
            _ => 0,
        };
        self.pod.remove().await?;
        Ok((lines.len(), requests))
    }
}

/// Somebody who asks a server again and again.
struct Clients {
    task: JoinHandle<Result<u64>>,
    stop: Arc<AtomicBool>,
}

impl Clients {
    /// Asks anew so many seconds after each answer.
    async fn start(server: String, pause: f64) -> Result<Self> {
        eventually("answer of the server", PATIENCE, async || ask(&server).await.ok()).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let task = tokio::spawn(async move {
            let mut answers = 0;
            while !told.load(Ordering::Relaxed) {
                ask(&server).await.with_context(|| format!("after {answers} answers of {server}"))?;
                answers += 1;
                sleep(Duration::from_secs_f64(pause)).await;
            }
            Ok(answers)
        });
        Ok(Self { task, stop })
    }

    async fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?
    }
}

/// One request, over a connection of its own.
async fn ask(server: &str) -> Result<()> {
    let answer = async {
        let mut stream = TcpStream::connect(server).await?;
        stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = timeout(Duration::from_secs(30), answer).await.context("no answer")??;
    ensure!(answer.ends_with("served\n"), "{answer:?}");
    Ok(())
}

/// Ends a daemon of build `old` that has so many pods with `signal`, and starts one of this build.
pub async fn run(pods: usize, old: Build, signal: Signal) -> Result<Report> {
    let mut daemon = Daemon::start_build(old, "", patient).await?;
    let mut cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let mut running = Vec::new();
    for number in 0..pods {
        running.push(Running::start(&cri, number, pods).await.with_context(|| format!("pod {number}"))?);
    }
    println!("soak: {pods} pods run");
    let containers = sorted(cri.containers(None).await?);

    let commands: Vec<_> = running
        .iter()
        .filter(|running| matches!(running.other, Some(Other::Executing)))
        .map(|running| running.writer.clone())
        .map(|writer| tokio::spawn(async move { writer.exec(&["sleep", "5432"]).await }))
        .collect();
    sleep(Duration::from_secs(2)).await;
    daemon.end(signal).await?;
    for command in commands {
        ensure!(command.await?.is_err(), "its daemon has ended");
    }
    let ended = end_some(&running).await?;
    sleep(AWAY).await;

    daemon.replace(Build::here()?)?;
    let start = Instant::now();
    daemon.restart().await?;
    let answered = start.elapsed();
    cri = daemon.cri().await?;
    running.iter_mut().for_each(|running| running.reconnect(&cri));
    stream::iter(&running).map(|running| running.writer.sh("true")).buffered(AT_ONCE).try_collect::<Vec<_>>().await?;
    let adopted = start.elapsed() - answered;
    println!(
        "soak: the new daemon answers after {answered:.1?}, and has run a command in each of {pods} pods after {adopted:.1?} more"
    );

    ensure!(cri.sandboxes(None).await?.len() == pods, "there are other pods");
    let now = sorted(cri.containers(None).await?);
    let ids = |containers: &[cri::Container]| containers.iter().map(|found| found.id.clone()).collect::<Vec<_>>();
    ensure!(ids(&now) == ids(&containers), "there are other containers: {now:?}");
    for pod in &running {
        pod.is_the_same().await?;
        if let Some(Other::Ending(container)) = &pod.other {
            has_ended(container, ended).await?;
        }
        eventually("end of the command of a client that went with its daemon", PATIENCE, async || {
            let left = pod.writer.exec(&["sh", "-c", "ps -o args | grep 'sleep 543[2]'"]).await.ok()?;
            left.stdout.is_empty().then_some(())
        })
        .await?;
        if pod.other.is_none() {
            ensure!(pod.pod.script("echo new").await? == "new\n", "of a container that was made afterwards");
        }
    }
    let mut report = Report { pods, answered, adopted, requests: 0, lines: 0 };
    for pod in running {
        let (lines, requests) = pod.end().await?;
        (report.lines, report.requests) = (report.lines + lines, report.requests + requests);
    }
    let held = daemon.holdings()?;
    ensure!(held.is_empty(), "left: {held:?}");
    Ok(report)
}

fn sorted(mut containers: Vec<cri::Container>) -> Vec<cri::Container> {
    containers.sort_by(|one, other| one.id.cmp(&other.id));
    containers
}

/// Ends the containers that wait for it; when that was.
async fn end_some(running: &[Running]) -> Result<SystemTime> {
    let time = SystemTime::now();
    for pod in running.iter().filter(|pod| matches!(pod.other, Some(Other::Ending(_)))) {
        let address = &pod.before.network.as_ref().context("no address")?.ip;
        timeout(ACCEPT, TcpStream::connect(format!("{address}:9000"))).await.context("nobody listens")??;
    }
    Ok(time)
}

/// It ended by itself, after `time` and right after it had said so, while there was no daemon.
async fn has_ended(container: &TestContainer, time: SystemTime) -> Result<()> {
    let status = container.exited().await?;
    ensure!((status.exit_code, status.reason.as_str()) == (7, "Error"), "{status:?}");
    let finished = SystemTime::UNIX_EPOCH + Duration::from_nanos(status.finished_at.try_into()?);
    let said = container.logs()?.pop().context("it told no time")?.text().trim().parse()?;
    let said = SystemTime::UNIX_EPOCH + Duration::from_secs(said);
    ensure!(finished > time - CLOCKS, "it is said to have ended at {finished:?}, before it was told to at {time:?}");
    let late = finished.duration_since(said - CLOCKS).context("it is said to have ended before it said so")?;
    ensure!(late < LAST, "it is said to have ended {late:?} after it said so");
    Ok(())
}
