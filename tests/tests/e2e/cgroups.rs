//! The VMMs' cgroups on the host: plain directories, and scopes of systemd.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Daemon, Systemd, TestPod, eventually, shell};

const PATIENCE: Duration = Duration::from_secs(60);
/// What the kubelet makes for a pod.
const POD: &str = "/isotest-pod";

/// The cgroup of a process, as a directory.
fn cgroup_of(process: &Path) -> anyhow::Result<PathBuf> {
    let text = fs::read_to_string(process.join("cgroup")).with_context(|| process.display().to_string())?;
    Ok(format!("/sys/fs/cgroup{}", text.trim().strip_prefix("0::").context("no cgroup v2")?).into())
}

fn pod_below(parent: &str) -> cri::PodSandboxConfig {
    let mut config = TestPod::config("grouped");
    config.linux.get_or_insert_default().cgroup_parent = parent.to_owned();
    config
}

#[tokio::test]
async fn a_vmm_killed_for_want_of_memory_costs_its_pod_alone_and_that_is_told() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let (victim, other) =
        (TestPod::run_with(&cri, pod_below(POD)).await?, TestPod::run_with(&cri, TestPod::config("other")).await?);
    let neighbour = other.start(shell("neighbour", "sleep 1000")).await?;
    let (running, ended) =
        (victim.start(shell("running", "sleep 1000")).await?, victim.start(shell("ended", "exit 3")).await?);
    assert_eq!(ended.exited().await?.exit_code, 3);
    let cgroup = cgroup_of(&victim.vmm(&daemon.state)?)?;
    let of_pod = cgroup.parent().context("the pod's")?;
    // The kubelet's limit. What the guest has touched of its memory is more than this, and there is no swap.
    fs::write(of_pod.join("memory.max"), "16M")?;
    let since = std::time::Instant::now();
    eventually("NOTREADY", PATIENCE, async || {
        victim.status().await.ok().filter(|status| status.state() == cri::PodSandboxState::SandboxNotready)
    })
    .await?;
    println!("NOTREADY {} ms after the limit was set", since.elapsed().as_millis());
    let status = running.exited().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    assert!(status.message.contains("want of memory"), "{status:?}");
    let status = ended.status().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"), "it had ended before");
    assert_eq!(neighbour.sh("echo alive").await?, "alive\n");
    victim.remove().await?;
    assert!(!cgroup.exists());
    fs::remove_dir(of_pod)?;
    other.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_sandbox_whose_cgroup_cannot_be_made_leaves_nothing() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    let run = async |parent: &str| {
        let request = cri::RunPodSandboxRequest { config: Some(pod_below(parent)), ..Default::default() };
        cri.runtime.clone().run_pod_sandbox(request).await.expect_err("it cannot be made")
    };
    let refused = run("/cgroup.procs").await;
    assert!(refused.message().contains("/sys/fs/cgroup/cgroup.procs/isopod-"), "{refused}");
    let refused = run("../outside").await;
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    assert!(daemon.vmms().is_empty());
    let sandboxes = fs::read_dir(daemon.state.join("sandboxes"))?.count();
    assert_eq!(sandboxes, 0);
    Ok(())
}

#[tokio::test]
async fn under_systemd_a_vmm_is_in_a_scope_of_its_pods_slice() -> anyhow::Result<()> {
    let systemd = Systemd::start().await?;
    let daemon = Daemon::start_after(&systemd.prelude(), |_| ()).await?;
    let cri = daemon.cri().await?;
    let driver = cri.runtime.clone().runtime_config(cri::RuntimeConfigRequest {}).await?.into_inner().linux;
    assert_eq!(driver.context("an answer")?.cgroup_driver(), cri::CgroupDriver::Systemd);
    cri.pull(BUSYBOX).await?;

    let slice = "isotest.slice/isotest-besteffort.slice/isotest-besteffort-pod1_2.slice";
    let pod = TestPod::run_with(&cri, pod_below(&format!("/{slice}"))).await?;
    let unit = format!("isopod-{}.scope", pod.id);
    let scope = systemd.cgroup(slice).join(&unit);
    assert_eq!(cgroup_of(&pod.vmm(&daemon.state)?)?, scope);
    let shown = systemd.systemctl(&["show", &unit, "--property=Slice,Delegate,ActiveState"])?;
    for property in ["Slice=isotest-besteffort-pod1_2.slice", "Delegate=yes", "ActiveState=active"] {
        assert!(shown.lines().any(|line| line == property), "{property}: {shown}");
    }

    let mut config = shell("pinned", "sleep 1000");
    config.linux.get_or_insert_default().resources =
        Some(cri::LinuxContainerResources { cpuset_cpus: "0".into(), cpuset_mems: "0".into(), ..Default::default() });
    let container = pod.start(config).await?;
    let cpus = || fs::read_to_string(scope.join("cpuset.cpus")).context("the CPUs of the scope");
    assert_eq!(cpus()?, "0\n");
    // systemd writes anew what it knows of.
    systemd.systemctl(&["daemon-reload"])?;
    assert_eq!(cpus()?, "0\n");
    assert!(fs::exists(scope.join("memory.events"))?, "a kill for want of memory would not be seen");
    container.remove().await?;
    assert_eq!(cpus()?, fs::read_to_string(systemd.cgroup("cpuset.cpus.effective"))?, "all there are");

    // Its scope goes with it, perhaps before the daemon has looked; the kernel's log stays.
    let victim = pod.start(shell("victim", "sleep 1000")).await?;
    fs::write(systemd.cgroup(slice).join("memory.max"), "16M")?;
    let status = victim.exited().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");

    // Where the kubelet has the other driver.
    let request = cri::RunPodSandboxRequest { config: Some(pod_below("/kubepods/pod1")), ..Default::default() };
    let refused = cri.runtime.clone().run_pod_sandbox(request).await.expect_err("no slice");
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("cgroup_driver"), "{refused}");

    pod.remove().await?;
    eventually("end of the scope", PATIENCE, async || {
        let units = systemd.systemctl(&["list-units", "--all", "--plain", "--no-legend", "isopod-*.scope"]).ok()?;
        (units.is_empty() && !scope.exists()).then_some(())
    })
    .await?;
    Ok(())
}
