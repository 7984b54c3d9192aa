//! Sandboxes: their life, their status, and that they leave nothing.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Cri, Daemon, TestPod, shell};
use tonic::Code;

/// What a pod of the daemon with this state directory could leave on the node.
fn traces(daemon: &Daemon) -> anyhow::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let find = |directory: &Path| -> anyhow::Result<String> {
        Ok(String::from_utf8(Command::new("find").arg(directory).args(["-mindepth", "1"]).output()?.stdout)?)
    };
    for path in [daemon.directory.path(), &daemon.state, Path::new("/sys/fs/cgroup")] {
        found.extend(
            find(path)?.lines().filter(|line| line.contains("isopod") || !line.starts_with("/sys")).map(str::to_owned),
        );
    }
    let links = Command::new("ip").args(["-o", "link", "show", "type", "tun"]).output()?;
    found.extend(
        String::from_utf8(links.stdout)?.lines().filter_map(|line| Some(format!("tap {}", line.split(": ").nth(1)?))),
    );
    Ok(found)
}

#[tokio::test]
async fn a_pod_from_run_to_remove() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    let mut config = TestPod::config("life");
    config.hostname = "life".to_owned();
    config.annotations.insert("note".to_owned(), "täg \u{1f980}".to_owned());
    let pod = TestPod::run_with(&cri, config.clone()).await?;

    let status = pod.status().await?;
    assert_eq!(status.state(), cri::PodSandboxState::SandboxReady);
    assert_eq!(status.metadata, config.metadata);
    assert_eq!(status.labels, config.labels);
    assert_eq!(status.annotations, config.annotations);
    assert!(status.created_at > 1_600_000_000_000_000_000, "created_at is in nanoseconds: {}", status.created_at);
    let address = status.network.map(|network| network.ip).unwrap_or_default();
    assert!(address.parse::<std::net::IpAddr>().is_ok(), "{address:?} is an address");

    let filter = |state| cri::PodSandboxFilter {
        id: pod.id.clone(),
        state: Some(cri::PodSandboxStateValue { state }),
        label_selector: config.labels.clone(),
    };
    let (ready, not_ready) = (cri::PodSandboxState::SandboxReady.into(), cri::PodSandboxState::SandboxNotready.into());
    assert_eq!(cri.sandboxes(Some(filter(ready))).await?.len(), 1);
    assert_eq!(cri.sandboxes(Some(filter(not_ready))).await?.len(), 0);

    pod.stop().await?;
    pod.stop().await?;
    assert_eq!(pod.status().await?.state(), cri::PodSandboxState::SandboxNotready);
    assert_eq!(cri.sandboxes(Some(filter(not_ready))).await?.len(), 1);

    let id = pod.id.clone();
    pod.remove().await?;
    let unknown = cri::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
    assert_eq!(
        cri.runtime.clone().pod_sandbox_status(unknown).await.map_err(|status| status.code()).err(),
        Some(Code::NotFound)
    );
    let again = cri::RemovePodSandboxRequest { pod_sandbox_id: id };
    cri.runtime.clone().remove_pod_sandbox(again).await?;
    Ok(())
}

#[tokio::test]
async fn a_running_pod_that_is_removed_leaves_nothing() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let before = traces(&daemon)?;
    let pod = TestPod::run_with(&cri, TestPod::config("gone")).await?;
    let container = pod.start(shell("runs", "sleep 1000")).await?;
    assert_ne!(traces(&daemon)?, before);
    let id = container.id.clone();
    let pod_id = pod.id.clone();
    // Neither the container nor the pod was stopped.
    pod.remove().await?;
    let after = traces(&daemon)?;
    // Other tests have pods meanwhile: only what bears this one's id counts among cgroups and taps.
    let own = |path: &str| path.contains(&pod_id[..12]) || !(path.starts_with("/sys") || path.starts_with("tap"));
    let left: Vec<_> = after.difference(&before).filter(|path| own(path) && !path.contains("/log")).collect();
    assert!(left.is_empty(), "left behind: {left:#?}");
    assert!(cri.containers(None).await?.iter().all(|container| container.id != id));
    Ok(())
}

#[tokio::test]
async fn a_second_pod_of_the_same_name_is_refused_and_the_name_is_free_after_removal() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    let config = TestPod::config("twice");
    let pod = TestPod::run_with(&cri, config.clone()).await?;
    let request = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    match cri.runtime.clone().run_pod_sandbox(request).await {
        // A client that gave up and asks again is told of the sandbox that was finished in the meantime.
        Ok(answer) => assert_eq!(answer.into_inner().pod_sandbox_id, pod.id),
        Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{status}"),
    }
    assert_eq!(
        cri.sandboxes(Some(cri::PodSandboxFilter { label_selector: config.labels.clone(), ..Default::default() }))
            .await?
            .len(),
        1
    );
    pod.remove().await?;
    TestPod::run_with(&cri, config).await?.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_killed_vmm_makes_its_pod_not_ready_and_its_container_137() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let pod = TestPod::run_with(&cri, TestPod::config("crash")).await?;
    let container = pod.start(shell("victim", "sleep 1000")).await?;
    let vmms = daemon.vmms();
    assert_eq!(vmms.len(), 1, "{vmms:?}");
    assert!(Command::new("kill").arg("-KILL").args(vmms[0].file_name()).status()?.success());
    let status = container.exited().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    isopod_tests::fixture::eventually("NOTREADY", std::time::Duration::from_secs(30), async || {
        pod.status().await.ok().filter(|status| status.state() == cri::PodSandboxState::SandboxNotready)
    })
    .await?;
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn pod_sysctls_and_host_name_are_those_asked_for() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    cri.pull(BUSYBOX).await?;
    let mut config = TestPod::config("sysctl");
    config.hostname = "some-host".to_owned();
    let linux = config.linux.get_or_insert_default();
    linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "80".to_owned());
    linux.sysctls.insert("kernel.shm_rmid_forced".to_owned(), "1".to_owned());
    let pod = TestPod::run_with(&cri, config).await?;
    let seen = pod
        .script("hostname; cat /etc/hostname /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced")
        .await?;
    assert_eq!(seen, "some-host\nsome-host\n80\n1\n");
    pod.remove().await?;
    Ok(())
}
