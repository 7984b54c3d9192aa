//! The jail of a pod's file server, looked at from the host: what is in /proc of it beside what is to be there. How it differs
//! from the VMM's, and why, is in `file-server/src/jail.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use isopod_cri_server::cri;
use isopod_tests::fixture::{TestPod, shell, unique};

use super::jail::{check_limits, check_namespaces, descriptors, status_line, without_numbers};

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID and SETFCAP.
const SERVER: &str = "000000008000001b";
/// SYS_ADMIN, with which shares are attached.
const BROKER: &str = "0000000000200000";
/// Every descriptor of the server of a pod with one share, with numbers left out: the root, its own descriptors in a proc file
/// system that is mounted nowhere, the null device of the host's /dev, which is out of sight, and what the guest knows of the share.
const DESCRIPTORS: [&str; 6] = ["/", "/N/fd", "/null", "DIRECTORY/fs.log", "SHARE", "socket:[N]"];
const LIMITS: [(&str, &str); 4] = [
    ("Max open files", "1048576"),
    ("Max core file size", "0"),
    ("Max locked memory", "0"),
    ("Max msgqueue size", "0"),
];

/// The broker and the server of the pod whose directory that is, as directories of /proc.
fn processes(directory: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    let log = directory.join("fs.log");
    let all = fs::read_dir("/proc")?.flatten().map(|entry| entry.path());
    let found = all.filter(|process| fs::read_link(process.join("fd/2")).is_ok_and(|target| target == log));
    let (servers, mut brokers): (Vec<_>, Vec<_>) =
        found.partition(|process| status_line(process, "NStgid").is_ok_and(|line| line.ends_with(" 1")));
    ensure!(servers.len() == 1 && brokers.len() == 1, "{servers:?} {brokers:?}");
    Ok((brokers.remove(0), servers[0].clone()))
}

/// What any thread of the process may do.
fn check_privileges(task: &Path, capabilities: &str) -> anyhow::Result<()> {
    for (name, value) in [
        ("Uid", "0 0 0 0"),
        ("Gid", "0 0 0 0"),
        ("Groups", ""),
        ("CapInh", "0000000000000000"),
        ("CapPrm", capabilities),
        ("CapEff", capabilities),
        ("CapBnd", capabilities),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
    ] {
        let seen = status_line(task, name)?;
        ensure!(seen == value, "{name} of {}: {seen}", task.display());
    }
    Ok(())
}

#[tokio::test]
async fn a_file_server_has_what_the_golden_list_says() -> anyhow::Result<()> {
    let share = PathBuf::from(format!("/tmp/{}", unique("served")));
    fs::create_dir(&share)?;
    let pod = TestPod::run("served").await?;
    let mut config = shell("served", "sleep 1000");
    config.mounts = vec![cri::Mount {
        host_path: share.display().to_string(),
        container_path: "/share".to_owned(),
        ..Default::default()
    }];
    let container = pod.start(config).await?;
    container.sh("echo text >/share/file; mkdir /share/to; mv /share/file /share/to/; cat /share/to/file").await?;
    assert_eq!(fs::read_to_string(share.join("to/file"))?, "text\n");

    let directory = pod.directory("/run/isopod".as_ref());
    let (broker, server) = processes(&directory)?;
    check_privileges(&broker, BROKER)?;
    for task in fs::read_dir(server.join("task"))? {
        let task = task?.path();
        check_privileges(&task, SERVER)?;
        let name = fs::read_to_string(task.join("comm"))?;
        assert_eq!(status_line(&task, "Seccomp")?, "2", "{name}");
        // The refusal of clone3, what the first thread began with, and a worker's own.
        let filters = if task.file_name() == server.file_name() { "2" } else { "3" };
        assert_eq!(status_line(&task, "Seccomp_filters")?, filters, "{name}");
    }
    let log = fs::read_to_string(directory.join("fs.log"))?;
    assert!(log.contains("with Landlock ABI"), "{log}");
    check_namespaces(&server, "/proc/self".as_ref())?;
    check_namespaces(&server, &pod.vmm("/run/isopod".as_ref())?)?;
    check_limits(&server, &LIMITS)?;

    for process in [&broker, &server] {
        let mounts = fs::read_to_string(process.join("mountinfo"))?;
        let mut mounts: Vec<Vec<&str>> = mounts.lines().map(|line| line.split(' ').collect()).collect();
        mounts.sort_by_key(|mount| mount[4]);
        assert_eq!(mounts.len(), 2, "{mounts:?}");
        assert_eq!((mounts[0][3], mounts[0][4]), ("/", "/"), "{mounts:?}");
        assert!(share.ends_with(mounts[1][3].trim_start_matches('/')), "{mounts:?}");
        assert!(mounts.iter().all(|mount| mount[5].contains("nosuid,nodev,noexec")), "{mounts:?}");
        let root: Vec<_> = fs::read_dir(process.join("root"))?.flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(root.len(), 1, "{root:?}");
    }
    let name = fs::read_dir(server.join("root"))?.next().context("the share")??.file_name();
    let below_share = format!("/{}", without_numbers(&name.to_string_lossy()));
    let known = descriptors(&server, &directory)?;
    let kinds: BTreeSet<&str> =
        known.iter().map(|known| if known.starts_with(&below_share) { "SHARE" } else { known.as_str() }).collect();
    assert_eq!(kinds, DESCRIPTORS.into());
    pod.remove().await?;
    fs::remove_dir_all(share)?;
    Ok(())
}
