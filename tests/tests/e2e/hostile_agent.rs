//! An agent, and a VMM, that answer the daemon with anything: each costs its own pod. What they do is in
//! `tests/src/bin/hostile-agent`, which takes the place of `isopod-vmm` in the configuration of a daemon of its own.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Cri, Daemon, TestContainer, TestPod, shell};
use isopod_tests::hostile::Behaviour;
use isopod_tests::process_memory::private_bytes_outside_guest;
use tonic::Code;

/// How long the agent may take to say hello. A real guest in the node takes 5 to 10 s, and several things happen at once.
const BOOT: u64 = 30;
/// The longest that any call may take: the kubelet's own deadline is 120 s.
const CALL: Duration = Duration::from_secs(115);
/// The cgroup of the hostile pods.
const CGROUP: &str = "/hostile";
/// How much the daemon may grow while all of it happens.
const GROWTH: u64 = 48 << 20;

/// The configuration of a pod whose agent behaves so.
fn pod(behaviour: Behaviour) -> cri::PodSandboxConfig {
    let mut config = TestPod::config(&format!("hostile-{behaviour:?}").to_lowercase());
    let limits = cri::LinuxContainerResources { memory_limit_in_bytes: behaviour.memory_limit(), ..Default::default() };
    config.linux = Some(cri::LinuxPodSandboxConfig {
        resources: Some(limits),
        cgroup_parent: CGROUP.to_owned(),
        ..Default::default()
    });
    config
}

/// Awaits `call`, which has to end within `limit`, however it does.
async fn ends<T>(what: &str, limit: Duration, call: impl Future<Output = T>) -> anyhow::Result<T> {
    let start = Instant::now();
    let answer =
        tokio::time::timeout(limit, call).await.with_context(|| format!("{what} takes longer than {limit:?}"))?;
    println!("{what}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(answer)
}

/// A pod whose agent says no proper hello is refused, and undone.
async fn refuse(cri: &Cri, behaviour: Behaviour) -> anyhow::Result<()> {
    let request = cri::RunPodSandboxRequest { config: Some(pod(behaviour)), ..Default::default() };
    let mut runtime = cri.runtime.clone();
    // After its hello it has as long as any agent.
    let limit = if behaviour == Behaviour::Mute { CALL } else { Duration::from_secs(BOOT + 30) };
    let answer = ends(&format!("{behaviour:?}: RunPodSandbox"), limit, runtime.run_pod_sandbox(request)).await?;
    let status = answer.err().with_context(|| format!("{behaviour:?}: the pod runs"))?;
    let expected = match behaviour {
        Behaviour::NoHello | Behaviour::SlowHello | Behaviour::Mute => Code::DeadlineExceeded,
        Behaviour::EndlessLine | Behaviour::CutHello => Code::Unavailable,
        _ => Code::DataLoss,
    };
    ensure!(status.code() == expected, "{behaviour:?}: {status}");
    ensure!(status.message().len() < 10_000, "{behaviour:?}: a message of {} bytes", status.message().len());
    Ok(())
}

/// Everything that a kubelet does with a pod, with one whose agent behaves so. What it answers matters less than that it does.
async fn torment(cri: &Cri, behaviour: Behaviour) -> anyhow::Result<()> {
    let what = |call: &str| format!("{behaviour:?}: {call}");
    let config = pod(behaviour);
    let pod = ends(&what("RunPodSandbox"), CALL, TestPod::run_with(cri, config)).await??;
    let mut runtime = cri.runtime.clone();
    let request = cri::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = ends(&what("PodSandboxStats"), Duration::from_secs(30), runtime.pod_sandbox_stats(request)).await?;
    if let Ok(Some(stats)) = stats.map(|stats| stats.into_inner().stats) {
        let interfaces =
            stats.linux.and_then(|linux| linux.network).map_or_else(Vec::new, |network| network.interfaces);
        ensure!(interfaces.len() <= 64, "{behaviour:?}: {} interfaces", interfaces.len());
        let plain = |name: &str| name.len() <= 64 && name.chars().all(|letter| letter.is_ascii_graphic());
        ensure!(interfaces.iter().all(|interface| plain(&interface.name)), "{behaviour:?}: {interfaces:?}");
    }
    let created = ends(&what("CreateContainer"), CALL, pod.create(shell("c", "true"))).await?;
    if let Ok(container) = created {
        let started = ends(&what("StartContainer"), CALL, container.start()).await?;
        if started.is_ok() {
            use_container(&container, behaviour).await?;
        }
        println!("{behaviour:?}: started: {started:?}");
        // A stop of the pod ends a container's that nobody would answer for minutes.
        let stop_pod = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            ends(&what("StopPodSandbox"), CALL, pod.stop()).await?.map_err(anyhow::Error::from)
        };
        let stop = async { ends(&what("StopContainer"), CALL, container.stop(1)).await };
        let (stopped, stopped_pod) = tokio::join!(stop, stop_pod);
        println!("{behaviour:?}: stopped: {:?}", stopped?.map_err(|status| status.code()));
        stopped_pod?;
        let status = ends(&what("ContainerStatus"), Duration::from_secs(5), container.status()).await??;
        check_status(&status)?;
    } else {
        println!("{behaviour:?}: not created: {created:?}");
    }
    ends(&what("StopPodSandbox"), CALL, pod.stop()).await??;
    ends(&what("RemovePodSandbox"), CALL, pod.remove()).await??;
    Ok(())
}

async fn use_container(container: &TestContainer, behaviour: Behaviour) -> anyhow::Result<()> {
    let what = |call: &str| format!("{behaviour:?}: {call}");
    let mut runtime = container.cri.runtime.clone();
    let exec = async {
        // A limit of 3 s is one for all of the call, and for an answer's way.
        let answer = ends(&what("ExecSync"), Duration::from_secs(20), container.exec_for(&["true"], 3)).await?;
        ensure!(answer.is_err(), "{behaviour:?}: a command was run: {answer:?}");
        anyhow::Ok(())
    };
    let stats = async {
        let request = cri::ContainerStatsRequest { container_id: container.id.clone() };
        ends(&what("ContainerStats"), Duration::from_secs(30), runtime.container_stats(request)).await.map(drop)
    };
    let lists = async {
        let list = container.cri.containers(None);
        ends(&what("ListContainers"), Duration::from_secs(5), list).await?.map_err(anyhow::Error::from)?;
        let status = ends(&what("ContainerStatus"), Duration::from_secs(5), container.status()).await??;
        check_status(&status)
    };
    let (exec, stats, lists) = tokio::join!(exec, stats, lists);
    exec.and(stats).and(lists)?;
    if behaviour == Behaviour::Lying {
        let status = container.exited().await?;
        check_status(&status)?;
        ensure!((status.exit_code, status.reason.as_str()) == (255, "Unknown"), "{status:?}");
    }
    Ok(())
}

/// What CRI promises of a status, whatever the guest says.
fn check_status(status: &cri::ContainerStatus) -> anyhow::Result<()> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as i64;
    ensure!((0..=255).contains(&status.exit_code), "{status:?}");
    ensure!(status.created_at <= now && status.started_at <= now && status.finished_at <= now, "{status:?}");
    ensure!(status.finished_at == 0 || status.finished_at >= status.started_at, "{status:?}");
    let groups =
        status.user.as_ref().and_then(|user| user.linux.as_ref()).map_or(0, |user| user.supplemental_groups.len());
    ensure!(groups <= 65_536, "{groups} groups");
    Ok(())
}

/// What the daemon holds of the node, and the cgroups of the hostile pods.
fn things(daemon: &Daemon) -> anyhow::Result<BTreeSet<String>> {
    let mut things = daemon.holdings()?;
    for entry in std::fs::read_dir(format!("/sys/fs/cgroup{CGROUP}")).into_iter().flatten() {
        let path = entry?.path();
        things.extend(path.is_dir().then(|| path.display().to_string()));
    }
    Ok(things)
}

fn private(daemon: &Daemon) -> anyhow::Result<u64> {
    private_bytes_outside_guest(daemon.pid(), u64::MAX)
}

#[tokio::test]
async fn whatever_an_agent_answers_costs_its_own_pod_alone() -> anyhow::Result<()> {
    let program = Path::new(env!("CARGO_BIN_EXE_hostile-agent"));
    let daemon = Daemon::start(|config| {
        let vmm = config.get_mut("vmm").and_then(toml::Value::as_table_mut).expect("tests/lib.sh writes this section");
        vmm.insert("binary".into(), program.display().to_string().into());
        vmm.insert("boot_deadline_seconds".into(), (BOOT as i64).into());
    })
    .await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let neighbour = TestPod::run_with(&cri, TestPod::config("neighbour")).await?;
    let container = neighbour.start(shell("neighbour", "sleep 1000")).await?;
    assert_eq!(container.sh("echo alive").await?, "alive\n");
    let (before, memory) = (things(&daemon)?, private(&daemon)?);

    let tormented = async {
        let bad = Behaviour::ALL.into_iter().filter(|behaviour| *behaviour as u8 >= Behaviour::Silent as u8);
        let results = futures_util::future::join_all(bad.map(|behaviour| Box::pin(torment(&cri, behaviour)))).await;
        results.into_iter().collect::<anyhow::Result<()>>()
    };
    let refused = async {
        let bad = Behaviour::ALL.into_iter().filter(|behaviour| (*behaviour as u8) < Behaviour::Silent as u8);
        let results = futures_util::future::join_all(bad.map(|behaviour| Box::pin(refuse(&cri, behaviour)))).await;
        results.into_iter().collect::<anyhow::Result<()>>()
    };
    let beside = async {
        // While all of it happens.
        tokio::time::sleep(Duration::from_secs(10)).await;
        ends("the neighbour's ExecSync", Duration::from_secs(40), container.sh("echo alive")).await?
    };
    // On the heap: together they are more than a test's thread has for its stack.
    let (tormented, refused, beside) = tokio::join!(Box::pin(tormented), Box::pin(refused), Box::pin(beside));
    let log = daemon.log();
    let panics: Vec<&str> = log.lines().filter(|line| line.contains("panicked")).collect();
    ensure!(panics.is_empty(), "{panics:?}");
    tormented.context("a pod whose agent is hostile")?;
    refused.context("a pod whose agent says no hello")?;
    assert_eq!(beside?, "alive\n");

    let grown = private(&daemon)?.saturating_sub(memory);
    println!("the daemon has {} KiB more than the {} KiB before", grown >> 10, memory >> 10);
    ensure!(grown < GROWTH, "the daemon has grown by {} MiB", grown >> 20);
    let after = things(&daemon)?;
    assert_eq!(after, before, "what is left");
    assert_eq!(container.sh("echo alive").await?, "alive\n");
    neighbour.remove().await?;
    // It is the kubelet's, which this test is.
    std::fs::remove_dir(format!("/sys/fs/cgroup{CGROUP}"))?;
    Ok(())
}
