//! What is wrong gets an error that names it, and leaves nothing behind.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Cri, Daemon, TestPod, shell};
use tonic::{Code, Status};

/// Checks an error's code and that its message names each of `words`.
fn assert_error<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, words: &[&str]) {
    let status = result.expect_err("it has to fail");
    assert_eq!(status.code(), code, "{status}");
    for word in words {
        assert!(status.message().contains(word), "{word:?} is not in {:?}", status.message());
    }
}

/// The layers and partial files in a daemon's store.
fn stored(daemon: &Daemon) -> anyhow::Result<Vec<String>> {
    let found = Command::new("find").arg(daemon.directory.path().join("root")).args(["-type", "f"]).output()?;
    let mut files: Vec<String> = String::from_utf8(found.stdout)?.lines().map(str::to_owned).collect();
    files.sort();
    Ok(files)
}

#[tokio::test]
async fn an_image_that_does_not_exist_is_named() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    assert_error(cri.pull("docker.io/library/no-such:latest").await, Code::NotFound, &["library/no-such:latest"]);
    assert_error(cri.pull("docker.io/library/busybox:no-such-tag").await, Code::NotFound, &["busybox:no-such-tag"]);
    let digest = format!("docker.io/library/busybox@sha256:{}", "1".repeat(64));
    assert_error(cri.pull(&digest).await, Code::NotFound, &["1111"]);
    for name in ["", "UPPER/case:x", "docker.io/library/busybox:bad tag", "docker.io/library/busybox@sha256:12"] {
        assert_error(cri.pull(name).await, Code::InvalidArgument, &[]);
    }
    Ok(())
}

#[tokio::test]
async fn a_registry_that_is_down_is_named() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    let start = Instant::now();
    // Unknown, as the kubelet's client looks at the prefix of the message only then (cri-api, pkg/apis/runtime/v1, errors).
    let pulled = cri.pull("down.example/image:latest").await;
    assert_error(pulled, Code::Unknown, &["RegistryUnavailable", "down.example/image:latest", "127.0.0.1:1"]);
    assert!(start.elapsed() < Duration::from_secs(100), "it took {:?}", start.elapsed());
    Ok(())
}

#[tokio::test]
async fn a_registry_that_says_nothing_is_given_up() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let daemon = Daemon::start(|config| mirror(config, "silent.example", port)).await?;
    let cri = daemon.cri().await?;
    let before = stored(&daemon)?;
    let start = Instant::now();
    let status = cri.pull("silent.example/image:latest").await.expect_err("nobody answers");
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Unavailable), "{status}");
    assert!(start.elapsed() < Duration::from_secs(150), "it took {:?}", start.elapsed());
    assert_eq!(stored(&daemon)?, before);
    drop(listener);
    Ok(())
}

/// Sends one more registry to a port on loopback.
fn mirror(config: &mut toml::Table, host: &str, port: u16) {
    let images =
        config.get_mut("images").and_then(toml::Value::as_table_mut).expect("tests/lib.sh writes this section");
    let mirrors = images.get_mut("mirrors").and_then(toml::Value::as_table_mut).expect("and its mirrors");
    mirrors.insert(host.to_owned(), format!("http://127.0.0.1:{port}").into());
}

#[tokio::test]
async fn a_manifest_of_a_hundred_megabytes_is_refused() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    // Ends with the test program; it serves each connection the same.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\nContent-Length: 104857600\r\n\r\n";
            let _ = stream.write_all(head.as_bytes());
            let block = vec![b' '; 1 << 20];
            while stream.write_all(&block).is_ok() {}
        }
    });
    let daemon = Daemon::start(|config| mirror(config, "big.example", port)).await?;
    let status = daemon.cri().await?.pull("big.example/image:latest").await.expect_err("it is too big");
    assert!(status.message().contains("manifest") || status.message().contains("large"), "{status}");
    Ok(())
}

#[tokio::test]
async fn hostile_layers_are_refused_and_leave_nothing() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    let before = stored(&daemon)?;
    for (image, words) in [
        ("dot-dot", &["climbed"][..]),
        ("hardlink", &["shadow"]),
        ("diff-id", &["diff id"]),
        ("truncated", &[]),
        ("bomb", &[]),
    ] {
        let name = format!("docker.io/bad/{image}:latest");
        let status = cri.pull(&name).await.expect_err(image);
        assert_ne!(status.code(), Code::Internal, "{status}");
        for word in words {
            assert!(status.message().contains(word), "{image}: {word:?} is not in {:?}", status.message());
        }
        assert_eq!(cri.image(&name).await?, None, "{image}");
        assert_eq!(stored(&daemon)?, before, "{image} leaves nothing in the store");
    }
    Ok(())
}

#[tokio::test]
async fn a_blob_with_another_digest_is_refused() -> anyhow::Result<()> {
    // A registry's storage in which one layer was changed after the push.
    let directory = tempfile::tempdir()?;
    let storage = isopod_tests::fixture::repository()?.join("out/registry");
    assert!(Command::new("cp").arg("-rL").arg(&storage).arg(directory.path().join("storage")).status()?.success());
    let found = Command::new("find").arg(directory.path()).args(["-name", "data", "-size", "+100k"]).output()?;
    for path in String::from_utf8(found.stdout)?.lines() {
        let mut data = std::fs::read(path)?;
        let middle = data.len() / 2;
        data[middle] ^= 1;
        std::fs::write(path, data)?;
    }
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut registry = Command::new(isopod_tests::fixture::repository()?.join("tests/registry/serve"))
        .arg(directory.path().join("storage"))
        .arg(port.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let result = async {
        isopod_tests::fixture::eventually("registry", Duration::from_secs(30), async || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        })
        .await?;
        let daemon = Daemon::start(|config| mirror(config, "changed.example", port)).await?;
        let cri = daemon.cri().await?;
        let before = stored(&daemon)?;
        let status = cri.pull("changed.example/library/busybox:latest").await.expect_err("its layer was changed");
        anyhow::ensure!(status.code() != Code::Internal, "{status}");
        anyhow::ensure!(stored(&daemon)? == before, "it leaves something in the store");
        Ok(())
    }
    .await;
    registry.kill()?;
    registry.wait()?;
    result
}

#[tokio::test]
async fn a_sandbox_config_without_metadata_is_refused() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    let run = async |config| {
        cri.runtime.clone().run_pod_sandbox(cri::RunPodSandboxRequest { config, ..Default::default() }).await
    };
    assert_error(run(None).await, Code::InvalidArgument, &["config"]);
    assert_error(run(Some(cri::PodSandboxConfig::default())).await, Code::InvalidArgument, &["metadata"]);
    for field in ["name", "namespace", "uid"] {
        let mut config = TestPod::config("empty");
        let metadata = config.metadata.get_or_insert_default();
        match field {
            "name" => metadata.name.clear(),
            "namespace" => metadata.namespace.clear(),
            _ => metadata.uid.clear(),
        }
        assert_error(run(Some(config)).await, Code::InvalidArgument, &[field]);
    }
    let request =
        cri::RunPodSandboxRequest { config: Some(TestPod::config("handler")), runtime_handler: "no-such".to_owned() };
    assert_error(cri.runtime.clone().run_pod_sandbox(request).await, Code::InvalidArgument, &["no-such"]);
    Ok(())
}

#[tokio::test]
async fn what_a_microvm_cannot_have_is_refused_by_name() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    let mut config = TestPod::config("host-network");
    config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
        namespace_options: Some(cri::NamespaceOption {
            network: cri::NamespaceMode::Node.into(),
            ..Default::default()
        }),
        ..Default::default()
    });
    let request = cri::RunPodSandboxRequest { config: Some(config), ..Default::default() };
    let status = cri.runtime.clone().run_pod_sandbox(request).await.expect_err("a VM has a network of its own");
    assert!(
        status.message().to_lowercase().contains("host network") || status.message().contains("network"),
        "{status}"
    );
    Ok(())
}

#[tokio::test]
async fn containers_that_cannot_be_are_refused_and_the_pod_lives_on() -> anyhow::Result<()> {
    let pod = TestPod::run("bad-containers").await?;
    let mut missing = shell("missing", "");
    missing.image.get_or_insert_default().image = "docker.io/library/not-pulled:latest".to_owned();
    assert_error(pod.create(missing).await, Code::NotFound, &["not-pulled"]);

    let mut no_metadata = shell("x", "true");
    no_metadata.metadata = None;
    assert_error(pod.create(no_metadata).await, Code::InvalidArgument, &["metadata"]);

    let group_only =
        cri::LinuxContainerSecurityContext { run_as_group: Some(cri::Int64Value { value: 5 }), ..Default::default() };
    let mut config = shell("group", "true");
    config.linux.get_or_insert_default().security_context = Some(group_only);
    assert_error(pod.create(config).await, Code::InvalidArgument, &["group"]);

    let no_user =
        cri::LinuxContainerSecurityContext { run_as_username: "nobody-knows".to_owned(), ..Default::default() };
    let mut config = shell("user", "true");
    config.linux.get_or_insert_default().security_context = Some(no_user);
    let status = pod.start(config).await.expect_err("the user is not in the image");
    assert!(status.message().contains("nobody-knows"), "{status}");

    let mut config = shell("command", "");
    config.command = vec!["/no/such/command".to_owned()];
    let container = pod.create(config).await?;
    let status = container.start().await.expect_err("the command is not in the image");
    assert!(status.message().contains("/no/such/command"), "{status}");
    let ended = container.status().await?;
    assert_eq!(
        (ended.state(), ended.exit_code, ended.reason.as_str()),
        (cri::ContainerState::ContainerExited, 128, "StartError")
    );
    container.remove().await?;

    let twice = shell("twice", "sleep 1000");
    let first = pod.create(twice.clone()).await?;
    assert!(pod.create(twice.clone()).await.is_err(), "the name is taken");
    first.remove().await?;
    pod.create(twice).await?.remove().await?;

    assert_eq!(pod.script("echo alive").await?, "alive\n");
    pod.stop().await?;
    assert!(pod.create(shell("late", "true")).await.is_err(), "a stopped pod takes no container");
    pod.remove().await?;
    Ok(())
}

/// Runs a pod on a daemon of its own whose VMM settings `edit` has changed, and returns the error.
async fn boot_error(edit: impl FnOnce(&mut toml::Table)) -> anyhow::Result<(Status, Daemon)> {
    let daemon = Daemon::start(|config| {
        edit(config.get_mut("vmm").and_then(toml::Value::as_table_mut).expect("tests/lib.sh writes this section"));
    })
    .await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let before = stored(&daemon)?;
    let request = cri::RunPodSandboxRequest { config: Some(TestPod::config("boot")), ..Default::default() };
    let status = cri.runtime.clone().run_pod_sandbox(request).await.expect_err("it cannot boot");
    assert_eq!(stored(&daemon)?, before, "files are left");
    assert!(cri.sandboxes(None).await?.is_empty(), "a sandbox is left");
    let children = Command::new("pgrep").args(["-P", &daemon.pid().to_string()]).output()?;
    assert!(children.stdout.is_empty(), "a process is left: {}", String::from_utf8_lossy(&children.stdout));
    Ok((status, daemon))
}

#[tokio::test]
async fn a_guest_kernel_that_is_missing_is_named() -> anyhow::Result<()> {
    let (status, _daemon) = boot_error(|vmm| drop(vmm.insert("kernel".to_owned(), "/no/such/vmlinux".into()))).await?;
    assert!(status.message().contains("/no/such/vmlinux"), "{status}");
    Ok(())
}

#[tokio::test]
async fn a_guest_kernel_that_is_none_is_refused() -> anyhow::Result<()> {
    let (status, _daemon) = boot_error(|vmm| drop(vmm.insert("kernel".to_owned(), "/etc/passwd".into()))).await?;
    assert!(status.message().contains("kernel"), "{status}");
    Ok(())
}

#[tokio::test]
async fn an_agent_that_never_answers_is_given_up_after_the_deadline() -> anyhow::Result<()> {
    let start = Instant::now();
    // An initramfs without an agent: the kernel finds no init.
    let empty = tempfile::NamedTempFile::new()?;
    assert!(
        Command::new("sh")
            .args(["-c", "printf '' | cpio -o -H newc 2>/dev/null > $0"])
            .arg(empty.path())
            .status()?
            .success()
    );
    let path = empty.path().display().to_string();
    let (status, _daemon) = boot_error(|vmm| {
        vmm.insert("initramfs".to_owned(), path.into());
        vmm.insert("boot_deadline_seconds".to_owned(), 20.into());
    })
    .await?;
    assert!(start.elapsed() < Duration::from_secs(90), "it took {:?}", start.elapsed());
    assert!(!status.message().is_empty());
    Ok(())
}

#[tokio::test]
async fn a_full_disk_during_a_pull_is_told_and_leaves_nothing() -> anyhow::Result<()> {
    // A file system of 4 MiB of the daemon's own.
    let directory = tempfile::tempdir()?;
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "small"]).arg(directory.path()).status()?;
    assert!(mount.success());
    let root = directory.path().display().to_string();
    let result = async {
        let daemon = Daemon::start(|config| drop(config.insert("root".to_owned(), root.into()))).await?;
        let cri = daemon.cri().await?;
        let status = cri.pull("docker.io/library/nginx:latest").await.expect_err("there is no room");
        anyhow::ensure!(status.code() == Code::ResourceExhausted, "{status}");
        anyhow::ensure!(cri.image("docker.io/library/nginx:latest").await?.is_none(), "a half image is listed");
        // What fits is still pulled afterwards: the failed pull has freed its room.
        cri.pull(BUSYBOX).await?;
        Ok(())
    }
    .await;
    let unmounted = Command::new("umount").args(["-l"]).arg(directory.path()).status()?;
    assert!(unmounted.success());
    result
}
