//! Logs, port-forward, volumes, disks and the network. fio and iperf3 are the node's own, run in a container that sees the node's root.

use std::io::Read as _;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use isopod_cri_server::cri;
use isopod_tests::fixture::{Cri, TestContainer, TestPod, eventually, shell};

use super::Figure;

const LOG_BYTES: usize = 16 << 20;
const FORWARDED_MIB: usize = 32;
/// The node's end of what is forwarded.
const FORWARDED_PORT: u16 = 20_080;
const FILE_MIB: u32 = 64;
/// Before the name of a program of the node's, whose root is at /node: its loader, by the path that the usual link leads to, with
/// the directories of libraries.
const RUN_OF_NODE: &str = "/node/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 \
    --library-path /node/usr/lib/x86_64-linux-gnu:/node/usr/lib/x86_64-linux-gnu/ceph /node/usr/bin";
/// Where fio's file is, on the node's disk.
const VOLUME: &str = "/run/disk/bench-volume";

pub async fn measure(cri: &Cri, socket: &Path) -> Result<Vec<Figure>> {
    let mut figures = vec![log(cri).await?, port_forward(cri, socket).await?];
    std::fs::create_dir_all(VOLUME)?;
    let mut config = TestPod::config("bench-io");
    // As the kubelet says it of a pod with a privileged container.
    let privileged = cri::LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
    config.linux = Some(cri::LinuxPodSandboxConfig { security_context: Some(privileged), ..Default::default() });
    let uid = config.metadata.clone().unwrap_or_default().uid;
    let empty_dir = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/bench");
    std::fs::create_dir_all(&empty_dir)?;
    let pod = TestPod::run_with(cri, config).await?;
    let mut config = shell("bench", "mkdir -p /scratch && exec sleep 10000");
    config.mounts =
        vec![mount("/", "/node", true), mount(VOLUME, "/node-volume", false), mount(&empty_dir, "/empty-dir", false)];
    let privileged = cri::LinuxContainerSecurityContext { privileged: true, ..Default::default() };
    config.linux = Some(cri::LinuxContainerConfig { security_context: Some(privileged), ..Default::default() });
    let container = pod.start(config).await?;
    for (what, directory, mode) in [
        ("fio: read of a host volume, 1 MiB blocks", "/node-volume", "read"),
        ("fio: write to a host volume, 1 MiB blocks", "/node-volume", "write"),
        ("fio: read of an emptyDir, 1 MiB blocks", "/empty-dir", "read"),
        ("fio: write to an emptyDir, 1 MiB blocks", "/empty-dir", "write"),
        ("fio: read of the root file system, 1 MiB blocks", "/scratch", "read"),
        ("fio: write to the root file system, 1 MiB blocks", "/scratch", "write"),
    ] {
        figures.push(fio(&container, what, directory, mode).await?);
    }
    figures.push(iperf(&pod, &container).await?);
    pod.remove().await?;
    std::fs::remove_dir_all(empty_dir)?;
    std::fs::remove_dir_all(VOLUME)?;
    Ok(figures)
}

fn mount(host_path: &str, container_path: &str, readonly: bool) -> cri::Mount {
    cri::Mount {
        host_path: host_path.to_owned(),
        container_path: container_path.to_owned(),
        readonly,
        ..Default::default()
    }
}

/// From the start of a container to its end with all its output in the log.
async fn log(cri: &Cri) -> Result<Figure> {
    let pod = TestPod::run_with(cri, TestPod::config("bench-log")).await?;
    let line = "0123456789".repeat(10);
    let container = pod.create(shell("bench", &format!("yes {line} | head -c {LOG_BYTES}"))).await?;
    let start = Instant::now();
    container.start().await?;
    container.exited().await?;
    let seconds = start.elapsed().as_secs_f64();
    let written: usize = container.logs()?.iter().map(|line| line.text().len()).sum();
    // The last line may be cut in its middle, and has no line feed then.
    ensure!(written.abs_diff(LOG_BYTES) <= 1, "the log has {written} of {LOG_BYTES} bytes");
    pod.remove().await?;
    Ok(Figure::throughput("log of a container", LOG_BYTES as f64, seconds))
}

/// From the pod to the node through crictl, which speaks SPDY.
async fn port_forward(cri: &Cri, socket: &Path) -> Result<Figure> {
    let pod = TestPod::run_with(cri, TestPod::config("bench-forward")).await?;
    let serve = format!("while :; do head -c {} /dev/zero | nc -l -p 8080; done", FORWARDED_MIB << 20);
    let _container = pod.start(shell("bench", &serve)).await?;
    let mut crictl = Command::new("crictl")
        .args(["--runtime-endpoint", &format!("unix://{}", socket.display()), "port-forward", "--transport", "spdy"])
        .args([pod.id.as_str(), &format!("{FORWARDED_PORT}:8080")])
        .stdout(Stdio::null())
        .spawn()
        .context("crictl")?;
    let fetched = eventually("forwarded bytes", Duration::from_secs(60), async || {
        tokio::task::spawn_blocking(fetch).await.ok()?.ok()
    })
    .await;
    crictl.kill()?;
    crictl.wait()?;
    pod.remove().await?;
    Ok(Figure::throughput("port-forward", (FORWARDED_MIB << 20) as f64, fetched?))
}

/// Seconds that all bytes of the forwarded port took. Fails as long as nobody listens at the other end.
fn fetch() -> Result<f64> {
    let start = Instant::now();
    let mut stream = TcpStream::connect(("127.0.0.1", FORWARDED_PORT))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let (mut buffer, mut count) = (vec![0; 1 << 16], 0);
    while count < FORWARDED_MIB << 20 {
        let read = stream.read(&mut buffer)?;
        ensure!(read > 0, "the end after {count} bytes");
        count += read;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Runs the node's fio on a file in `directory` of the container.
async fn fio(container: &TestContainer, what: &'static str, directory: &str, mode: &str) -> Result<Figure> {
    let script = format!(
        "{RUN_OF_NODE}/fio --name=bench \
         --directory={directory} --rw={mode} --bs=1M --size={FILE_MIB}M --ioengine=psync --end_fsync=1 --invalidate=1 --output-format=terse"
    );
    let line = container.sh(&script).await?;
    // fio(1), "TERSE OUTPUT": fields 7 and 48 are the bandwidths of reads and writes in KiB/s.
    let field = if mode == "read" { 6 } else { 47 };
    let terse = line.lines().find(|line| line.contains(';')).with_context(|| format!("fio printed {line:?}"))?;
    let bandwidth: f64 = terse.split(';').nth(field).context("fio printed too few fields")?.parse()?;
    Ok(Figure::throughput(what, bandwidth * 1024.0, 1.0))
}

/// TCP from the pod to the node.
async fn iperf(pod: &TestPod, container: &TestContainer) -> Result<Figure> {
    let address = pod.address().await?;
    let route = Command::new("ip").args(["-o", "route", "get", &address]).output()?;
    let route = String::from_utf8(route.stdout)?;
    let node =
        route.split_whitespace().skip_while(|word| *word != "src").nth(1).context("no route to the pod")?.to_owned();
    let mut server = Command::new("iperf3").args(["--server", "--one-off"]).stdout(Stdio::null()).spawn()?;
    // Not by connecting: that would be the one test of `--one-off`.
    eventually("iperf3 server", Duration::from_secs(20), async || {
        let sockets = Command::new("ss").args(["-ltn", "sport = :5201"]).output().ok()?;
        String::from_utf8_lossy(&sockets.stdout).contains(":5201").then_some(())
    })
    .await?;
    let script = format!("{RUN_OF_NODE}/iperf3 --client {node} --time 5 --json");
    let output = container.sh(&script).await?;
    server.wait()?;
    let report: serde_json::Value = serde_json::from_str(&output)?;
    let sum = &report["end"]["sum_received"];
    let bits = sum["bits_per_second"].as_f64().with_context(|| format!("iperf3 printed {output:?}"))?;
    Ok(Figure::throughput("iperf3: TCP from the pod to the node", bits / 8.0, 1.0))
}
