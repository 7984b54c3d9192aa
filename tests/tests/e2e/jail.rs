//! The jail of a pod's VMM, looked at from the host: what is in /proc of it beside what is to be there, and what happens to it when it
//! does what its jail does not allow. `vmm/tests/jail.rs` tries the rest.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Daemon, TestPod, eventually, shell};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};

/// The users of vmm.first_uid and vmm.uids.
const USERS: std::ops::Range<u32> = 0x7000_0000..0x7001_0000;
/// Every descriptor that a VMM with a running container may have, with numbers left out.
const DESCRIPTORS: [&str; 12] = [
    "/dev/net/tun",
    "/dev/null",
    "DIRECTORY/exit",
    "DIRECTORY/vmm.log",
    "IMAGES",
    "SCRATCH",
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:[signalfd]",
    "anon_inode:kvm-vcpu:N",
    "anon_inode:kvm-vm",
    "socket:[N]",
];
/// Lines of /proc/PID/status of every thread.
const STATUS: [(&str, &str); 9] = [
    ("Groups", ""),
    ("CapInh", "0000000000000000"),
    ("CapPrm", "0000000000000000"),
    ("CapEff", "0000000000000000"),
    ("CapBnd", "0000000000000000"),
    ("CapAmb", "0000000000000000"),
    ("NoNewPrivs", "1"),
    ("Seccomp", "2"),
    // The last number is the one in the innermost namespace.
    ("NStgid", "1"),
];
/// Lines of /proc/PID/limits: soft and hard limit.
const LIMITS: [(&str, &str); 6] = [
    ("Max open files", "32768"),
    ("Max processes", "256"),
    // The scratch disk of tests/lib.sh.
    ("Max file size", "1073741824"),
    ("Max core file size", "0"),
    ("Max locked memory", "0"),
    ("Max msgqueue size", "0"),
];

/// A line of /proc/PID/status, with single spaces.
pub(super) fn status_line(task: &Path, name: &str) -> anyhow::Result<String> {
    let status = fs::read_to_string(task.join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {name}"))?.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn uid(process: &Path) -> anyhow::Result<u32> {
    let line = status_line(process, "Uid")?;
    let ids: BTreeSet<&str> = line.split(' ').collect();
    ensure!(ids.len() == 1, "several users: {line}");
    ensure!(status_line(process, "Gid")? == line, "the group is not the user");
    Ok(line.split(' ').next().context("no user")?.parse()?)
}

/// `N` in place of each number.
pub(super) fn without_numbers(text: &str) -> String {
    let mut plain: String = text.chars().map(|c| if c.is_ascii_digit() { 'N' } else { c }).collect();
    while plain.contains("NN") {
        plain = plain.replace("NN", "N");
    }
    plain
}

/// What the descriptors of `process` are, without numbers and names that differ from pod to pod.
pub(super) fn descriptors(process: &Path, directory: &Path) -> anyhow::Result<BTreeSet<String>> {
    let mut kinds = BTreeSet::new();
    for entry in fs::read_dir(process.join("fd"))? {
        let target = fs::read_link(entry?.path())?.display().to_string();
        let target = target.replace(&directory.display().to_string(), "DIRECTORY");
        let target = match target {
            path if path.contains("/scratch/") => "SCRATCH".to_owned(),
            path if path.contains("/images/") => "IMAGES".to_owned(),
            other => without_numbers(&other),
        };
        kinds.insert(target);
    }
    Ok(kinds)
}

/// No namespace of `process` is one of `other`'s.
pub(super) fn check_namespaces(process: &Path, other: &Path) -> anyhow::Result<()> {
    for namespace in ["mnt", "net", "pid", "ipc", "uts", "cgroup"] {
        let namespace = Path::new("ns").join(namespace);
        let (own, others) = (fs::read_link(process.join(&namespace))?, fs::read_link(other.join(&namespace))?);
        ensure!(own != others, "{} of both", own.display());
    }
    Ok(())
}

/// Soft and hard limit are both what is given.
pub(super) fn check_limits(process: &Path, expected: &[(&str, &str)]) -> anyhow::Result<()> {
    let limits = fs::read_to_string(process.join("limits"))?;
    for (name, value) in expected {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
        let values: Vec<&str> = line.split_whitespace().take(2).collect();
        ensure!(values == [*value, *value], "{name}: {values:?}");
    }
    Ok(())
}

fn check_process(process: &Path, directory: &Path) -> anyhow::Result<()> {
    // Not dumpable: its files in /proc are root's, though it is not.
    assert_eq!(fs::metadata(process.join("fd"))?.uid(), 0);
    check_namespaces(process, "/proc/self".as_ref())?;
    let mounts = fs::read_to_string(process.join("mountinfo"))?;
    let mount: Vec<&str> = mounts.lines().next().context("a root")?.split(' ').collect();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert_eq!((mount[3], mount[4]), ("/", "/"), "{mounts}");
    assert!(mount[5].starts_with("ro,nosuid,nodev,noexec"), "{mounts}");
    assert!(mounts.contains(" - tmpfs "), "{mounts}");
    assert_eq!(fs::read_dir(process.join("root"))?.count(), 0, "the root is not empty");
    let interfaces = fs::read_to_string(process.join("net/dev"))?;
    let names: Vec<&str> =
        interfaces.lines().skip(2).filter_map(|line| line.split(':').next()).map(str::trim).collect();
    assert_eq!(names, ["lo"]);

    check_limits(process, &LIMITS)?;
    assert_eq!(descriptors(process, directory)?, DESCRIPTORS.map(str::to_owned).into());
    Ok(())
}

/// Looks at each thread, and returns the names of their kinds.
fn check_threads(process: &Path) -> anyhow::Result<BTreeSet<String>> {
    let mut kinds = BTreeSet::new();
    for task in fs::read_dir(process.join("task"))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm"))?.trim().to_owned();
        for (line, value) in STATUS {
            let seen = status_line(&task, line)?;
            let seen = if line == "NStgid" { seen.rsplit(' ').next().unwrap_or_default().to_owned() } else { seen };
            assert_eq!(seen, value, "{line} of {name}");
        }
        // The refusal of clone3, what the one that started it had, its own. The starter was started by none that had one. KVM's own
        // threads, which make no system calls, have what the one had that made KVM start them.
        let filters: u32 = status_line(&task, "Seccomp_filters")?.parse()?;
        assert_eq!(filters, if name == "starter" { 2 } else { 3 }, "{name}");
        assert_eq!(uid(&task)?, uid(process)?, "{name}");
        kinds.insert(name.split([' ', '0']).next().unwrap_or_default().to_owned());
    }
    Ok(kinds)
}

#[tokio::test]
async fn a_vmm_has_what_the_golden_list_says_and_nothing_of_another_ones() -> anyhow::Result<()> {
    let (first, second) = tokio::try_join!(TestPod::run("jail"), TestPod::run("jail"))?;
    first.start(shell("jailed", "sleep 1000")).await?;
    let state = Path::new("/run/isopod");
    let process = first.vmm(state)?;
    check_process(&process, &first.directory(state))?;
    let kinds = check_threads(&process)?;
    for kind in ["isopod-vmm", "vcpu", "starter", "balloon", "block", "mem", "net", "rng", "vsock"] {
        assert!(kinds.contains(kind), "{kind} is not among {kinds:?}");
    }
    let other = second.vmm(state)?;
    check_namespaces(&process, &other)?;
    let users = [uid(&process)?, uid(&other)?];
    assert!(users[0] != users[1] && users.iter().all(|user| USERS.contains(user)), "{users:?}");
    first.remove().await?;
    second.remove().await?;
    Ok(())
}

/// Lets the first thread of the process go on with other registers, as code of somebody else's in it would.
fn derail(process: i32, change: fn(&mut nix::libc::user_regs_struct)) -> anyhow::Result<()> {
    let pid = nix::unistd::Pid::from_raw(process);
    ptrace::seize(pid, ptrace::Options::PTRACE_O_EXITKILL)?;
    ptrace::interrupt(pid)?;
    waitpid(pid, Some(WaitPidFlag::__WALL))?;
    let mut registers = ptrace::getregs(pid)?;
    change(&mut registers);
    ptrace::setregs(pid, registers)?;
    // A process 1 that is traced survives what would kill it.
    Ok(ptrace::detach(pid, None)?)
}

/// It waits for a client, in a system call: back to that instruction, of two bytes, with the number of execve.
fn execute(registers: &mut nix::libc::user_regs_struct) {
    (registers.rax, registers.orig_rax) = (59, u64::MAX);
    registers.rip -= 2;
}

/// Where there is no code.
fn go_astray(registers: &mut nix::libc::user_regs_struct) {
    (registers.rip, registers.orig_rax) = (8, u64::MAX);
}

#[tokio::test]
async fn a_vmm_that_breaks_out_or_crashes_costs_its_pod_alone_and_users_outlive_the_daemon() -> anyhow::Result<()> {
    let two_users = |config: &mut toml::Table| {
        let vmm = config.get_mut("vmm").and_then(toml::Value::as_table_mut).expect("tests/lib.sh writes this section");
        vmm.insert("first_uid".into(), 70_000.into());
        vmm.insert("uids".into(), 2.into());
    };
    let mut daemon = Daemon::start(two_users).await?;
    let mut cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let mut first = TestPod::run_with(&cri, TestPod::config("user")).await?;
    let mut container = first.start(shell("victim", "sleep 1000")).await?;
    let process = first.vmm(&daemon.state)?;

    daemon.end(rustix::process::Signal::KILL).await?;
    daemon.restart().await?;
    cri = daemon.cri().await?;
    (first.cri, container.cri) = (cri.clone(), cri.clone());
    let second = TestPod::run_with(&cri, TestPod::config("user")).await?;
    let users = BTreeSet::from([uid(&process)?, uid(&second.vmm(&daemon.state)?)?]);
    assert_eq!(users, BTreeSet::from([70_000, 70_001]));
    let request = cri::RunPodSandboxRequest { config: Some(TestPod::config("user")), ..Default::default() };
    let refused = cri.runtime.clone().run_pod_sandbox(request).await.expect_err("there is no third user");
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    assert!(refused.message().contains("vmm.uids"), "{refused}");
    second.remove().await?;
    // Its user is free again. These VMMs are children of the daemon that runs, which learns how they end.
    for (change, expected) in [(execute as fn(&mut _), "SIGSYS"), (go_astray, "SIGSEGV")] {
        let pod = TestPod::run_with(&cri, TestPod::config("user")).await?;
        let victim = pod.start(shell("victim", "sleep 1000")).await?;
        let process = pod.vmm(&daemon.state)?;
        let pid = process.file_name().and_then(|name| name.to_str()).context("a pid")?.parse()?;
        tokio::task::spawn_blocking(move || derail(pid, change)).await??;
        let status = victim.exited().await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
        eventually("NOTREADY", Duration::from_secs(30), async || {
            pod.status().await.ok().filter(|status| status.state() == cri::PodSandboxState::SandboxNotready)
        })
        .await?;
        assert!(daemon.log().contains(expected), "{}", daemon.log());
        // The other one has not noticed.
        assert_eq!(container.sh("echo alive").await?, "alive\n");
        pod.remove().await?;
    }
    first.remove().await?;
    Ok(())
}
