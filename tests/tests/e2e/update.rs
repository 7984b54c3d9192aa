//! Changes of limits while a container is there.

use anyhow::{Context, ensure};
use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Daemon, LogLine, TestContainer, TestPod, eventually, shell};
use rustix::process::Signal;
use tonic::Code;

const MIB: i64 = 1 << 20;

async fn update(pod: &TestPod, id: &str, limits: cri::LinuxContainerResources) -> Result<(), tonic::Status> {
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(limits),
        annotations: [("updated".to_owned(), "yes".to_owned())].into(),
    };
    pod.cri.runtime.clone().update_container_resources(request).await.map(drop)
}

async fn update_pod(pod: &TestPod, limits: cri::LinuxContainerResources) -> Result<(), tonic::Status> {
    let request = cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        overhead: None,
        resources: Some(limits),
    };
    pod.cri.runtime.clone().update_pod_sandbox_resources(request).await.map(drop)
}

async fn limits(container: &TestContainer) -> anyhow::Result<cri::LinuxContainerResources> {
    let resources = container.status().await?.resources.context("no resources")?;
    resources.linux.context("no limits")
}

/// The memory and CPU limits that the guest's kernel has for the container.
async fn in_force(container: &TestContainer) -> anyhow::Result<(String, String)> {
    let seen = container.sh("cd /sys/fs/cgroup && cat memory.max cpu.max").await?;
    let (memory, cpu) = seen.trim().split_once('\n').context("two lines")?;
    Ok((memory.to_owned(), cpu.to_owned()))
}

fn limits_of(memory: i64, cpu: &str) -> (String, String) {
    (memory.to_string(), cpu.to_owned())
}

fn memory(bytes: i64) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() }
}

#[tokio::test]
async fn limits_change_in_the_guest_and_in_the_status_or_nowhere() -> anyhow::Result<()> {
    let pod = TestPod::run("update").await?;
    let mut config = shell("update", "dd if=/dev/zero of=/dev/shm/held bs=1M count=24; echo held; sleep 1000");
    let asked = cri::LinuxContainerResources { cpu_shares: 512, ..memory(64 * MIB) };
    config.linux.get_or_insert_default().resources = Some(asked.clone());
    let container = pod.create(config).await?;
    ensure!(limits(&container).await? == asked, "what was asked for is shown");

    // Before the start.
    update(
        &pod,
        &container.id,
        cri::LinuxContainerResources { cpu_quota: 50_000, cpu_period: 100_000, ..memory(80 * MIB) },
    )
    .await?;
    let wanted = cri::LinuxContainerResources {
        cpu_quota: 50_000,
        cpu_period: 100_000,
        ..cri::LinuxContainerResources { memory_limit_in_bytes: 80 * MIB, ..asked.clone() }
    };
    ensure!(limits(&container).await? == wanted);
    container.start().await?;
    let held = |lines: &[LogLine]| lines.iter().any(|line| line.content == b"held");
    container.logged("output", std::time::Duration::from_secs(60), held).await?;
    ensure!(in_force(&container).await? == limits_of(80 * MIB, "50000 100000"));

    // While it runs.
    update(&pod, &container.id, cri::LinuxContainerResources { cpu_quota: 70_000, ..memory(48 * MIB) }).await?;
    ensure!(in_force(&container).await? == limits_of(48 * MIB, "70000 100000"));
    ensure!(container.status().await?.annotations.get("updated").is_some_and(|value| value == "yes"));

    // What cannot be changes nothing, not even what could be.
    let before = limits(&container).await?;
    let both = |bytes| cri::LinuxContainerResources { cpu_quota: 20_000, ..memory(bytes) };
    let unified = cri::LinuxContainerResources {
        unified: [("memory.nonsense".to_owned(), "1".to_owned())].into(),
        ..both(60 * MIB)
    };
    for (bad, code, word) in [
        (both(16 * MIB), Code::FailedPrecondition, "in use"),
        (both(64 << 30), Code::FailedPrecondition, "can grow to"),
        (unified, Code::InvalidArgument, "memory.nonsense"),
        (
            cri::LinuxContainerResources { cpuset_cpus: "0-".into(), ..both(60 * MIB) },
            Code::InvalidArgument,
            "cpuset_cpus",
        ),
    ] {
        let error = update(&pod, &container.id, bad).await.err().context("it was accepted")?;
        ensure!(error.code() == code && error.message().contains(word), "{error:?}");
    }
    ensure!(limits(&container).await? == before);
    ensure!(in_force(&container).await? == limits_of(48 * MIB, "70000 100000"));
    ensure!(container.status().await?.state() == cri::ContainerState::ContainerRunning, "nobody was killed");
    let unknown = update(&pod, "nosuch", memory(MIB)).await;
    ensure!(unknown.err().map(|error| error.code()) == Some(Code::NotFound));

    // The pod: a limit that its VM has is in force, one that it has not is refused.
    update_pod(&pod, memory(128 * MIB)).await?;
    let stats = cri::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = pod.cri.runtime.clone().pod_sandbox_stats(stats).await?.into_inner().stats.unwrap_or_default();
    let memory_of = stats.linux.and_then(|linux| linux.memory).context("no memory")?;
    let number = |value: Option<cri::UInt64Value>| value.map(|value| value.value).unwrap_or_default();
    ensure!(number(memory_of.available_bytes) + number(memory_of.working_set_bytes) == 128 << 20, "{memory_of:?}");
    let error = update_pod(&pod, memory(64 << 30)).await.err().context("it was accepted")?;
    ensure!(error.code() == Code::FailedPrecondition && error.message().contains("can grow to"), "{error:?}");
    pod.remove().await?;
    Ok(())
}

/// Processors of the guest that run, and its memory in MiB.
async fn size(container: &TestContainer) -> anyhow::Result<(u32, i64)> {
    let seen = container.sh("nproc; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").await?;
    let (processors, memory) = seen.trim().split_once('\n').context("two lines")?;
    Ok((processors.parse()?, memory.parse::<i64>()? / 1024))
}

fn both(cpus: i64, bytes: i64) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources { cpu_quota: cpus * 100_000, cpu_period: 100_000, ..memory(bytes) }
}

#[tokio::test]
async fn a_vm_grows_and_shrinks_with_the_limits_of_its_pod() -> anyhow::Result<()> {
    let mut daemon = Daemon::start(|config| {
        let vmm = config.get_mut("vmm").and_then(toml::Value::as_table_mut).expect("a section");
        vmm.insert("max_vcpus".into(), 3.into());
        vmm.insert("max_memory_mib".into(), 1024.into());
    })
    .await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let mut config = TestPod::config("resized");
    config.linux.get_or_insert_default().resources = Some(both(1, 64 * MIB));
    let mut pod = TestPod::run_with(&cri, config).await?;
    let mut container = pod.start(shell("resized", "exec sleep 1000")).await?;
    let (processors, made) = size(&container).await?;
    ensure!(processors == 1 && made < 140, "{processors} processors, {made} MiB");
    let use_memory = ["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"];

    update_pod(&pod, both(3, 256 * MIB)).await?;
    let (processors, grown) = size(&container).await?;
    ensure!(processors == 3 && grown >= made + 192, "{processors} processors, {made} and then {grown} MiB");
    let used = container.exec(&use_memory).await?;
    ensure!(used.code == 0, "{used:?}");

    // What it cannot have changes nothing.
    let error = update_pod(&pod, both(1, 2048 * MIB)).await.err().context("it was accepted")?;
    ensure!(error.code() == Code::FailedPrecondition && error.message().contains("1022 MiB"), "{error:?}");
    ensure!(size(&container).await? == (3, grown));

    // The next daemon knows how large it is, and that it is too large for the pod then.
    daemon.end(Signal::KILL).await?;
    daemon.restart().await?;
    let cri = daemon.cri().await?;
    (pod.cri, container.cri) = (cri.clone(), cri);
    update_pod(&pod, both(2, 64 * MIB)).await?;
    let patience = std::time::Duration::from_secs(90);
    eventually("memory that is given back", patience, async || {
        size(&container).await.ok().filter(|(processors, memory)| (*processors, *memory) == (2, made))
    })
    .await?;

    // By a container's limits, too.
    update(&pod, &container.id, both(1, 200 * MIB)).await?;
    let (processors, grown) = size(&container).await?;
    ensure!(processors == 2 && grown > made + 100, "{processors} processors, {made} and then {grown} MiB");
    pod.remove().await?;
    Ok(())
}

/// What of the host's CPUs and memory nodes the pod's VM may use.
fn cpu_sets(pod: &TestPod) -> anyhow::Result<(String, String)> {
    let directory = std::path::PathBuf::from(format!("/sys/fs/cgroup/isopod/isopod-{}", pod.id));
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).map(|text| text.trim().to_owned());
    Ok((read("cpuset.cpus")?, read("cpuset.mems")?))
}

#[tokio::test]
async fn a_vm_has_the_cpus_of_its_containers() -> anyhow::Result<()> {
    let pod = TestPod::run("cpu-sets").await?;
    let with = |cpus: &str, mems: &str| {
        let resources = cri::LinuxContainerResources {
            cpuset_cpus: cpus.to_owned(),
            cpuset_mems: mems.to_owned(),
            ..Default::default()
        };
        let linux = cri::LinuxContainerConfig { resources: Some(resources), ..Default::default() };
        cri::ContainerConfig { linux: Some(linux), ..shell("cpu-sets", "exec sleep 1000") }
    };
    let sets = |cpus: &str, mems: &str| (cpus.to_owned(), mems.to_owned());
    let error = pod.create(with("8191", "")).await.expect_err("the node has no such CPU");
    ensure!(error.code() == Code::FailedPrecondition && error.message().contains("8191"), "{error:?}");
    // One container that has all of the node: so has the VM. One that has ended has nothing.
    let first = pod.start(with("", "")).await?;
    let second = pod.start(with("0", "0")).await?;
    ensure!(cpu_sets(&pod)? == sets("", ""));
    let only = cri::LinuxContainerResources { cpuset_cpus: "0".to_owned(), ..Default::default() };
    update(&pod, &first.id, only).await?;
    ensure!(cpu_sets(&pod)? == sets("0", ""));
    first.stop(0).await?;
    ensure!(cpu_sets(&pod)? == sets("0", "0"));
    let status = second.status().await?.resources.and_then(|resources| resources.linux).context("no limits")?;
    ensure!(status.cpuset_cpus == "0" && status.cpuset_mems == "0", "{status:?}");
    pod.remove().await?;
    Ok(())
}
