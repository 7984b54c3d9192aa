//! The machine a pod is: its kernel, processors, memory and disks.

use std::path::PathBuf;
use std::time::Duration;

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Daemon, TestPod, eventually, shell};

#[tokio::test]
async fn a_pod_has_a_kernel_and_memory_of_its_own() -> anyhow::Result<()> {
    let pod = TestPod::run("kernel").await?;
    let seen = pod
        .script("uname -r; awk '/^MemTotal/ {print $2}' /proc/meminfo; awk '/^MemAvailable/ {print $2}' /proc/meminfo")
        .await?;
    let lines: Vec<&str> = seen.lines().collect();
    let node = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    assert_ne!(lines[0], node.trim());
    let (total, available): (u64, u64) = (lines[1].parse()?, lines[2].parse()?);
    assert!((200 << 10..=256 << 10).contains(&total), "{total} KiB of the VM's 256 MiB");
    assert!(available > total / 2, "{available} of {total} KiB are free");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn memory_that_a_guest_frees_is_the_nodes_again() -> anyhow::Result<()> {
    const MIB: u64 = 1 << 20;
    let pod = TestPod::run("freeing").await?;
    let container = pod.start(shell("freeing", "exec sleep 1000")).await?;
    let cgroup = PathBuf::from(format!("/sys/fs/cgroup/isopod/isopod-{}", pod.id));
    let read = |name: &str| -> anyhow::Result<u64> { Ok(std::fs::read_to_string(cgroup.join(name))?.trim().parse()?) };
    let before = read("memory.current")?;
    let used = container.exec(&["dd", "if=/dev/zero", "of=/dev/null", "bs=140M", "count=1"]).await?;
    assert_eq!(used.code, 0, "{used:?}");
    let peak = read("memory.peak")?;
    assert!(peak > before + 120 * MIB, "{peak} bytes at most, {before} before");
    eventually("memory that the guest does not use any more", Duration::from_secs(60), async || {
        read("memory.current").ok().filter(|now| *now < before + 30 * MIB)
    })
    .await?;
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_pod_with_limits_gets_their_processors_and_memory() -> anyhow::Result<()> {
    let settings = |config: &mut toml::Table| {
        let vmm = config.get_mut("vmm").and_then(toml::Value::as_table_mut).expect("tests/lib.sh writes this section");
        vmm.insert("vcpus".into(), 2.into());
    };
    let daemon = Daemon::start(settings).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let limited = |stem: &str, limits| {
        let mut config = TestPod::config(stem);
        config.linux.get_or_insert_default().resources = Some(limits);
        config
    };
    let one = cri::LinuxContainerResources { cpu_period: 100_000, cpu_quota: 90_000, ..Default::default() };
    let pod = TestPod::run_with(&cri, limited("up", one)).await?;
    assert_eq!(pod.script("nproc").await?, "1\n", "less than the daemon's setting");
    pod.remove().await?;

    let memory = cri::LinuxContainerResources { memory_limit_in_bytes: 512 << 20, ..Default::default() };
    let pod = TestPod::run_with(&cri, limited("smp", memory)).await?;
    let seen = pod.script("nproc; awk '/^MemTotal/ {print $2}' /proc/meminfo").await?;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[0], "2");
    assert!(lines[1].parse::<u64>()? >= 512 << 10, "{} KiB", lines[1]);
    // Both do work at once.
    let busy = pod
        .script(
            "for i in 1 2; do taskset -c $((i-1)) sh -c 'n=0; while [ $n -lt 3000 ]; do n=$((n+1)); done; \
             grep Cpus_allowed_list /proc/self/status' & done; wait",
        )
        .await?;
    assert_eq!(busy.lines().count(), 2, "{busy}");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_disk_comes_with_an_image_and_goes_with_its_last_container() -> anyhow::Result<()> {
    let pod = TestPod::run("disks").await?;
    let watcher = pod.start(shell("watcher", "sleep 1000")).await?;
    let disks = "ls /sys/block | grep -c '^vd'";
    let before = watcher.sh(disks).await?;
    let image = "gcr.io/k8s-staging-cri-tools/test-image-1:latest";
    pod.cri.pull(image).await?;
    for _ in 0..3 {
        let mut config = shell("guest", "cat /number; sleep 1000");
        config.image.get_or_insert_default().image = image.to_owned();
        let container = pod.start(config).await?;
        assert_ne!(watcher.sh(disks).await?, before, "the image's disk was plugged in");
        assert_eq!(container.sh("cat /number").await?, "1\n");
        container.stop(0).await?;
        container.remove().await?;
    }
    assert_eq!(watcher.sh(disks).await?, before, "the image's disk is gone");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_container_writes_and_reads_back_a_big_file() -> anyhow::Result<()> {
    let pod = TestPod::run("scratch").await?;
    let container = pod.start(shell("scratch", "sleep 1000")).await?;
    let seen = container
        .sh("head -c 33554432 /dev/urandom > /big && sync && sha256sum < /big && echo 3 2>/dev/null > /proc/sys/vm/drop_caches; sha256sum < /big; rm /big")
        .await?;
    let sums: Vec<&str> = seen.lines().collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{seen}");
    pod.remove().await?;
    Ok(())
}
