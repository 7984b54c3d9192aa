//! emptyDir volumes of the kubelet: file systems of the pod's own, which the kubelet can measure and which outlive a sandbox.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Daemon, Kubelet, TestPod, eventually, shell};
use rustix::process::Signal;
use tonic::Code;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

fn mount(host: &Path, container: &str) -> cri::Mount {
    cri::Mount { host_path: host.display().to_string(), container_path: container.to_owned(), ..Default::default() }
}

/// What the kubelet, which adds up what is in the directory, takes the volume to use.
fn used(volume: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(volume)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes)
}

#[tokio::test]
async fn an_empty_dir_is_the_guests_own_and_outlives_it() -> anyhow::Result<()> {
    let config = TestPod::config("empty-dir");
    let uid = config.metadata.clone().unwrap_or_default().uid;
    let kubelet = Kubelet::new(&uid)?;
    let cache = kubelet.volume("empty-dir", "cache")?;
    chown(&cache, None, Some(2000))?;
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o2777))?;
    let memory = kubelet.volume("empty-dir", "memory")?;
    kubelet.tmpfs(&memory, "size=8m,mode=1777")?;
    let foreign = Kubelet::new("somebody-else")?;
    let shared = foreign.volume("empty-dir", "shared")?;

    let mut daemon = Daemon::start(|_| ()).await?;
    let mut cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let mut pod = TestPod::run_with(&cri, config.clone()).await?;
    let mut first = shell("first", "exec sleep 1000");
    first.mounts = vec![mount(&cache, "/cache"), mount(&memory, "/memory"), mount(&shared, "/shared")];
    let mut first = pod.start(first).await?;

    let seen = "awk '$2 ~ /^.(cache|memory|shared)$/ {print $2, $3}' /proc/mounts; stat -c '%a %u:%g' /cache /memory; \
        ls -A /cache; df -k /memory | awk 'END {print $2}'";
    let wanted = "/cache ext4\n/memory tmpfs\n/shared virtiofs\n2777 0:2000\n1777 0:0\n8192\n";
    assert_eq!(first.sh(seen).await?, wanted);
    // What is written counts on the host, and what is deleted does not any more.
    let before = used(&cache)?;
    first.sh("mkfifo /cache/fifo && dd if=/dev/urandom of=/cache/big bs=1M count=24 && sync").await?;
    let full = used(&cache)?;
    assert!(before < 8 * MIB && full >= before + 24 * MIB, "{before}, then {full}");
    first.sh("rm /cache/big && sync").await?;
    let less = async || used(&cache).ok().filter(|bytes| *bytes < before + 8 * MIB);
    eventually("space that is given back", PATIENCE, less).await?;

    // Sub-paths: one the kubelet has made, one that only the guest knows, and a read-only whole.
    first.sh("echo one > /cache/file; echo kept > /cache/kept; echo ram > /memory/ram").await?;
    let mut second = shell("second", "echo two > /sub/two; cat /etc/one /ro/ram; touch /ro/x || stat -c '%a %g' /sub");
    second.mounts = vec![
        mount(&kubelet.sub_path(&cache, "deep/sub", "second")?, "/sub"),
        mount(&kubelet.sub_path(&cache, "file", "second")?, "/etc/one"),
        cri::Mount { readonly: true, ..mount(&memory, "/ro") },
    ];
    let (_, lines) = pod.run_to_end(second).await?;
    let printed: String = lines.iter().filter(|line| line.stream == "stdout").map(|line| line.text()).collect();
    assert_eq!(printed, "one\nram\n2777 2000\n");
    assert_eq!(first.sh("cat /cache/deep/sub/two").await?, "two\n");

    // A daemon that comes back finds them; no other VM can have the disk meanwhile.
    daemon.end(Signal::KILL).await?;
    daemon.restart().await?;
    cri = daemon.cri().await?;
    (pod.cri, first.cri) = (cri.clone(), cri.clone());
    let mounts = vec![mount(&cache, "/cache"), mount(&memory, "/memory")];
    let third = cri::ContainerConfig { mounts: mounts.clone(), ..shell("third", "cat /cache/kept /memory/ram") };
    let (_, lines) = pod.run_to_end(third).await?;
    assert_eq!(lines.iter().map(|line| line.text()).collect::<String>(), "kept\nram\n");
    let mut again = config.clone();
    again.metadata.as_mut().expect("it has some").attempt = 1;
    let next = TestPod::run_with(&cri, again).await?;
    let reader = cri::ContainerConfig { mounts, ..shell("reader", "cat /cache/kept; ls /cache /memory") };
    let refused = next.create(reader.clone()).await.expect_err("the first VM has it");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("in use by another VM"), "{refused}");

    // The first VM dies in the middle of its work; what was written before is there for the next.
    first.sh("sync; (while :; do echo x >> /cache/growing; done) >/dev/null 2>&1 &").await?;
    let victim = pod.vmm(&daemon.state)?;
    assert!(Command::new("kill").arg("-KILL").args(victim.file_name()).status()?.success());
    first.exited().await?;
    let (end, lines) = next.run_to_end(reader).await?;
    let text: String = lines.iter().map(|line| line.text()).collect();
    assert!(end.exit_code == 0 && text.starts_with("kept\n/cache:\ndeep\n") && !text.contains("ram"), "{text}");
    next.stop().await?;
    next.remove().await?;
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}
