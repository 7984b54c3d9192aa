//! `isopod stop-all`.

use std::process::Command;

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Daemon, TestPod, repository, shell};

#[tokio::test]
async fn all_pods_are_stopped_with_grace_and_those_of_the_system_last() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let (mut pods, mut containers) = (vec![], vec![]);
    for namespace in ["kube-system", "default"] {
        let mut config = TestPod::config("ending");
        config.metadata.get_or_insert_default().namespace = namespace.to_owned();
        let pod = TestPod::run_with(&cri, config).await?;
        containers
            .push(pod.start(shell("ending", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done")).await?);
        pods.push(pod);
    }
    for container in &containers {
        container.logged("its trap", std::time::Duration::from_secs(60), |lines| !lines.is_empty()).await?;
    }
    let stop_all = async || {
        let (program, config) = (repository()?.join("out/isopod"), daemon.directory.path().join("config.toml"));
        let mut command = Command::new(program);
        command.arg("--config").arg(config).args(["stop-all", "--grace", "60"]);
        anyhow::Ok(tokio::task::spawn_blocking(move || command.output()).await??)
    };
    let output = stop_all().await?;
    let said = String::from_utf8(output.stdout)?;
    assert!(output.status.success(), "{said} {}", String::from_utf8_lossy(&output.stderr));
    assert!(said.find("default/") < said.find("kube-system/"), "{said}");
    for pod in &pods {
        assert_eq!(pod.status().await?.state(), cri::PodSandboxState::SandboxNotready);
    }
    let (system, other) = (containers[0].status().await?, containers[1].status().await?);
    assert_eq!([system.exit_code, other.exit_code], [5, 5], "each was asked, not killed");
    assert!(system.finished_at > other.finished_at, "{system:?} {other:?}");
    assert!(daemon.vmms().is_empty());
    // There is nothing more to do.
    assert!(stop_all().await?.stdout.is_empty());
    for pod in pods {
        pod.remove().await?;
    }
    Ok(())
}
