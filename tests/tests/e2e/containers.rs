//! Containers: their life, their ends, their limits.

use isopod_cri_server::cri::{self, ContainerState};
use isopod_tests::fixture::{BUSYBOX, TestPod, shell};
use tonic::Code;

#[tokio::test]
async fn a_container_from_create_to_remove() -> anyhow::Result<()> {
    let pod = TestPod::run("container").await?;
    let mut config = shell("life", "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done");
    config.labels.insert("l".to_owned(), "v".to_owned());
    config.annotations.insert("a".to_owned(), "w".to_owned());
    let container = pod.create(config.clone()).await?;
    let created = container.status().await?;
    assert_eq!(created.state(), ContainerState::ContainerCreated);
    assert_eq!((created.started_at, created.finished_at), (0, 0));
    assert_eq!(created.image.as_ref().map(|image| image.image.as_str()), Some(BUSYBOX));
    assert!(!created.image_ref.is_empty());
    assert_eq!(created.labels, config.labels);
    assert_eq!(created.annotations, config.annotations);

    container.start().await?;
    assert!(container.log.exists(), "the log is there when StartContainer answers");
    let running = container.status().await?;
    assert_eq!(running.state(), ContainerState::ContainerRunning);
    assert!(running.started_at >= running.created_at);
    let again = container.start().await;
    assert!(again.is_err(), "a running container cannot be started");

    let filter = cri::ContainerFilter {
        pod_sandbox_id: pod.id.clone(),
        label_selector: config.labels.clone(),
        ..Default::default()
    };
    let listed = pod.cri.containers(Some(filter)).await?;
    assert_eq!(listed.iter().map(|container| container.id.as_str()).collect::<Vec<_>>(), [container.id.as_str()]);

    // Its trap is set only when it has printed.
    container.logged("output", std::time::Duration::from_secs(30), |lines| !lines.is_empty()).await?;
    container.stop(30).await?;
    let exited = container.status().await?;
    assert_eq!(
        (exited.state(), exited.exit_code, exited.reason.as_str()),
        (ContainerState::ContainerExited, 3, "Error")
    );
    assert!(exited.finished_at >= exited.started_at);
    container.stop(30).await?;
    container.remove().await?;
    container.remove().await?;
    let gone = container.status().await.err().and_then(|error| error.downcast::<tonic::Status>().ok());
    assert_eq!(gone.map(|status| status.code()), Some(Code::NotFound));
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn ends_are_reported_as_they_were() -> anyhow::Result<()> {
    let pod = TestPod::run("ends").await?;
    for (script, code, reason) in [
        ("exit 0", 0, "Completed"),
        ("exit 1", 1, "Error"),
        ("exit 255", 255, "Error"),
        ("kill -TERM $$; sleep 10", 143, "Error"),
        ("kill -SEGV $$; sleep 10", 139, "Error"),
        ("no-such-command", 127, "Error"),
    ] {
        let (status, _) = pod.run_to_end(shell("end", script)).await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{script}");
    }
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_container_that_ignores_its_stop_signal_is_killed_after_the_grace() -> anyhow::Result<()> {
    let pod = TestPod::run("deaf").await?;
    let container = pod.start(shell("deaf", "trap '' TERM; touch /deaf; sleep 1000 & wait; sleep 1000")).await?;
    let deaf = async || container.exec(&["test", "-e", "/deaf"]).await.ok().filter(|end| end.code == 0);
    isopod_tests::fixture::eventually("deaf container", std::time::Duration::from_secs(30), deaf).await?;
    let start = std::time::Instant::now();
    container.stop(2).await?;
    assert!(start.elapsed().as_secs_f64() >= 2.0, "the grace was kept");
    let status = container.status().await?;
    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 137));
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_container_over_its_memory_limit_is_reported_as_oom_killed() -> anyhow::Result<()> {
    let pod = TestPod::run("oom").await?;
    // tail keeps all it reads of a stream without line feeds.
    let mut config = shell("oom", "tail /dev/zero");
    let resources = cri::LinuxContainerResources { memory_limit_in_bytes: 24 << 20, ..Default::default() };
    config.linux.get_or_insert_default().resources = Some(resources);
    let (status, _) = pod.run_to_end(config).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    // The pod lives on.
    assert_eq!(pod.script("echo alive").await?, "alive\n");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn limits_are_in_the_containers_cgroup() -> anyhow::Result<()> {
    let pod = TestPod::run("limits").await?;
    let limits = cri::LinuxContainerResources {
        cpu_quota: 50_000,
        cpu_period: 100_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        oom_score_adj: 500,
        ..Default::default()
    };
    let seen = pod
        .script_with(
            "cd /sys/fs/cgroup && cat cpu.max memory.max cpu.weight /proc/self/oom_score_adj && cat /proc/self/cgroup",
            |config| config.linux.get_or_insert_default().resources = Some(limits),
        )
        .await?;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[..2], ["50000 100000", "67108864"]);
    // 1 + (512 - 2) * 9999 / 262142, as cgroup v2 runtimes convert shares.
    assert_eq!(lines[2], "20");
    assert_eq!(lines[3..], ["500", "0::/"], "its own cgroup namespace");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn pid_namespaces_are_shared_or_own_as_asked() -> anyhow::Result<()> {
    let pod = TestPod::run("pids").await?;
    let with_mode = |mode: cri::NamespaceMode, target: &str| {
        let namespaces = cri::NamespaceOption { pid: mode.into(), target_id: target.to_owned(), ..Default::default() };
        move |config: &mut cri::ContainerConfig| {
            config.linux.get_or_insert_default().security_context =
                Some(cri::LinuxContainerSecurityContext { namespace_options: Some(namespaces), ..Default::default() });
        }
    };
    let own =
        pod.script_with("echo $$; ls -d /proc/[0-9]* | wc -l", with_mode(cri::NamespaceMode::Container, "")).await?;
    assert!(own.starts_with("1\n"), "the first process of a namespace of its own has the number 1: {own:?}");

    let mut first = shell("first", "exec sleep 1001");
    with_mode(cri::NamespaceMode::Pod, "")(&mut first);
    let first = pod.start(first).await?;
    let shared = pod.script_with("ps", with_mode(cri::NamespaceMode::Pod, "")).await?;
    assert!(shared.contains("sleep 1001"), "the pod's other container is seen: {shared}");

    let mut target = shell("target", "exec sleep 1002");
    with_mode(cri::NamespaceMode::Container, "")(&mut target);
    let target = pod.start(target).await?;
    let joined = pod.script_with("ps", with_mode(cri::NamespaceMode::Target, &target.id)).await?;
    assert!(joined.contains("sleep 1002") && !joined.contains("sleep 1001"), "only the target's processes: {joined}");
    first.stop(0).await?;
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn what_a_container_writes_is_its_own_and_goes_with_it() -> anyhow::Result<()> {
    let pod = TestPod::run("writes").await?;
    let writer = pod.start(shell("writer", "sleep 1000")).await?;
    writer.sh("echo mine > /file && rm /etc/group && mkdir /dir && mv /etc/passwd /dir/").await?;
    assert_eq!(
        writer.sh("cat /file; ls /etc/group /etc/passwd 2>&1 | wc -l; grep -c ^root: /dir/passwd").await?,
        "mine\n2\n1\n"
    );
    assert_eq!(pod.script("ls /file /dir 2>/dev/null; grep -c ^root: /etc/passwd").await?, "1\n");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_read_only_root_cannot_be_written() -> anyhow::Result<()> {
    let pod = TestPod::run("readonly").await?;
    let security = cri::LinuxContainerSecurityContext { readonly_rootfs: true, ..Default::default() };
    let mut config = shell("readonly", "touch /file; touch /dev/shm/file && echo shm");
    config.linux.get_or_insert_default().security_context = Some(security);
    let (status, lines) = pod.run_to_end(config).await?;
    let text: String = lines.iter().map(isopod_tests::fixture::LogLine::text).collect();
    assert!(text.contains("Read-only file system"), "{text}");
    assert!(text.contains("shm"), "{text}");
    assert_eq!(status.exit_code, 0);
    pod.remove().await?;
    Ok(())
}
