//! The VMM process itself.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use command_fds::CommandFdExt;
use isopod_proto::vmm::vm_exit::Reason;
use isopod_proto::vmm::{Disk, NetworkInterface, Segment, User, VmConfig, VmExit};
use isopod_proto::{CONSOLE_RING_BYTES, decode_frame};
use nix::sched::CloneFlags;
use prost::Message;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::timeout;

use super::stat::field;
use super::{CONTROL_SOCKET, VSOCK_SOCKET, VmEnd, VmIdentity, VmmError, console_tail};

/// The signal of a process that makes a system call it may not (signal(7)).
const SIGSYS: i32 = 31;
/// Largest exit record that is read.
const MAX_EXIT: usize = CONSOLE_RING_BYTES + 64 * 1024;
/// Lines of the console that a message shows.
const CONSOLE_LINES: usize = 30;
/// How long a VMM that does not take its configuration may take to end.
const END_GRACE: Duration = Duration::from_secs(3);

/// What a VMM is started with.
pub struct VmSpec {
    /// The `isopod-vmm` program.
    pub binary: PathBuf,
    /// The VM's own directory: exists, and only root can look into it.
    pub directory: PathBuf,
    /// The user, and the group, that the VMM becomes.
    pub uid: u32,
    /// Those at the boot: 1 to 64.
    pub vcpus: u32,
    /// The guest's memory at the boot.
    pub memory_bytes: u64,
    /// What it can be resized to.
    pub max_vcpus: u32,
    /// As above.
    pub max_memory_bytes: u64,
    /// The guest kernel.
    pub kernel: File,
    /// The guest's initramfs.
    pub initramfs: File,
    /// Writable disks.
    pub disks: Vec<BootDisk>,
    /// The open tap, its guest's MAC address, and its MTU.
    pub interface: (OwnedFd, [u8; 6], u32),
    /// All kernel messages go to the console.
    pub verbose_console: bool,
}

/// A disk that is there from the start.
pub struct BootDisk {
    /// Its id.
    pub id: &'static str,
    /// Its contents.
    pub file: File,
    /// Bytes.
    pub length: u64,
}

/// A VMM process that runs, or did.
pub struct Vm {
    identity: VmIdentity,
    directory: PathBuf,
    pidfd: Arc<OwnedFd>,
    ended: watch::Receiver<Option<Arc<VmEnd>>>,
}

/// What a started VMM waits for before it does anything. If this goes away undelivered, as with a daemon that ends, the VMM
/// reads an empty configuration, which it refuses, and ends.
pub struct Configuration {
    pipe: OwnedFd,
    bytes: Vec<u8>,
}

impl Configuration {
    /// Gives `vm` its configuration. To be called once the VM's identity is durable: no VM runs that nobody knows of.
    pub async fn deliver(self, vm: &Vm) -> Result<(), VmmError> {
        let Self { pipe, bytes } = self;
        let ended = |end: Arc<VmEnd>| VmmError::Ended { message: end.message.clone(), console: end.console.clone() };
        // Looked at first: a process that is just being started holds a copy of the pipe until it executes its program.
        if let Some(end) = vm.end() {
            return Err(ended(end));
        }
        // The pipe does not block, and is empty: it takes all of what is within bounds at once.
        let source = match rustix::io::write(&pipe, &bytes) {
            Ok(count) if count == bytes.len() => return Ok(()),
            Ok(count) => io::Error::other(format!("the pipe takes {count} bytes of the {} at once", bytes.len())),
            Err(error) => error.into(),
        };
        // If nobody reads it any more, the VMM's end says more than the pipe.
        if source.kind() == io::ErrorKind::BrokenPipe
            && let Ok(end) = timeout(END_GRACE, vm.ended()).await
        {
            return Err(ended(end));
        }
        Err(VmmError::Process { doing: "configure", pid: vm.identity.pid, source })
    }
}

/// Collects the descriptors a VMM inherits. They keep their numbers: given other ones, they could replace the pipe by which
/// the child tells that the program cannot be executed, and the failure would pass for a success.
#[derive(Default)]
struct Inherited(Vec<OwnedFd>);

impl Inherited {
    fn add(&mut self, fd: OwnedFd) -> i32 {
        let number = fd.as_raw_fd();
        self.0.push(fd);
        number
    }
}

impl Vm {
    /// Makes the two sockets in `directory`. Connections to them wait until the VMM runs.
    pub fn listen(directory: &Path) -> Result<(UnixListener, UnixListener), VmmError> {
        let bind = |name: &str| {
            let path = directory.join(name);
            UnixListener::bind(&path).map_err(|source| VmmError::File { doing: "listen on", path, source })
        };
        Ok((bind(CONTROL_SOCKET)?, bind(VSOCK_SOCKET)?))
    }

    /// Starts a VMM on the sockets of [`Vm::listen`]. It does nothing before it is given its configuration.
    pub fn spawn(spec: VmSpec, sockets: (UnixListener, UnixListener)) -> Result<(Self, Configuration), VmmError> {
        let file = |name: &str| {
            let path = spec.directory.join(name);
            File::create(&path).map_err(|source| VmmError::File { doing: "make", path, source })
        };
        let (exit, log) = (file("exit")?, file("vmm.log")?);
        let failed = |source: io::Error| VmmError::Spawn { binary: spec.binary.clone(), source };
        let log_again = log.try_clone().map_err(failed)?;
        let (config_read, config_write) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        rustix::io::ioctl_fionbio(&config_write, true).map_err(|error| failed(error.into()))?;

        let mut inherited = Inherited::default();
        let config_fd = inherited.add(config_read);
        let (tap, mac, mtu) = spec.interface;
        let config = VmConfig {
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            max_vcpus: spec.max_vcpus,
            max_memory_bytes: spec.max_memory_bytes,
            kernel_fd: inherited.add(spec.kernel.into()),
            initramfs_fd: inherited.add(spec.initramfs.into()),
            cmdline: String::new(),
            control_fd: inherited.add(sockets.0.into()),
            vsock_fd: inherited.add(sockets.1.into()),
            // Connections come and go through the Unix socket, so VMs may share a context id.
            guest_cid: 3,
            disks: spec
                .disks
                .into_iter()
                .map(|disk| Disk {
                    id: disk.id.to_owned(),
                    readonly: false,
                    segments: vec![Segment { fd: inherited.add(disk.file.into()), offset: 0, length: disk.length }],
                })
                .collect(),
            interfaces: vec![NetworkInterface { tap_fd: inherited.add(tap), mac: mac.to_vec(), mtu }],
            exit_fd: inherited.add(exit.into()),
            verbose_console: spec.verbose_console,
            user: Some(User { uid: spec.uid, gid: spec.uid }),
        };
        let mut command = Command::new(&spec.binary);
        command
            .arg("--config-fd")
            .arg(config_fd.to_string())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log_again)
            .process_group(0)
            .preserved_fds(inherited.0);
        let child = spawn_in_pid_namespace(&mut command).map_err(failed)?;
        // The command holds our copies of the descriptors; the VMM's must be the only ones.
        drop(command);
        let started = Started { child: Some(child) };
        let vm = started.watch(&spec.directory)?;
        Ok((vm, Configuration { pipe: config_write, bytes: config.encode_to_vec() }))
    }

    /// The process that `identity` names, if it still runs; it was started by an earlier daemon.
    pub fn find(identity: VmIdentity, directory: &Path) -> Result<Self, VmmError> {
        let gone = VmmError::Gone { pid: identity.pid };
        let Ok(pidfd) = open_pidfd(identity.pid) else { return Err(gone) };
        // Looked at after the pidfd was opened: the pid cannot have been used again in between.
        match start_time(identity.pid) {
            Ok(start_time) if start_time == identity.start_time => Self::watch(identity, directory, pidfd, None),
            _ => Err(gone),
        }
    }

    /// Every VMM process whose directory is, or was, in `parent`: known by its log, which is its standard output.
    pub fn find_all(parent: &Path) -> Vec<Self> {
        let Ok(parent) = parent.canonicalize() else { return Vec::new() };
        let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let find = |pid| {
            let start_time = start_time(pid).ok()?;
            let directory = directory_of(&std::fs::read_link(format!("/proc/{pid}/fd/1")).ok()?, &parent)?;
            // That it is still the same process is looked at once more.
            Self::find(VmIdentity { pid, start_time }, &directory).ok()
        };
        pids.filter_map(find).collect()
    }

    /// A VM that is any process.
    #[cfg(test)]
    pub fn of_process(pid: i32, directory: &Path) -> Self {
        let identity = VmIdentity { pid, start_time: start_time(pid).expect("it runs") };
        Self::find(identity, directory).expect("it runs")
    }

    fn watch(identity: VmIdentity, directory: &Path, pidfd: OwnedFd, child: Option<Child>) -> Result<Self, VmmError> {
        let failed = |source| VmmError::Process { doing: "watch", pid: identity.pid, source };
        let watched = pidfd.try_clone().map_err(failed)?;
        #[expect(
            deprecated,
            reason = "sound for an OwnedFd, which stays what it is; the replacement is an unsafe function"
        )]
        let watched = AsyncFd::with_interest(watched, Interest::READABLE).map_err(failed)?;
        let (sender, ended) = watch::channel(None);
        let exit = directory.join("exit");
        // Ends with the process; it is the one place that reaps a child of this daemon.
        tokio::spawn(async move {
            if let Err(error) = watched.readable().await {
                tracing::error!(pid = identity.pid, %error, "cannot watch the VMM process");
                return;
            }
            let status = child.map(|mut child| child.wait());
            let end = read_end(&exit, status.and_then(Result::ok).map(told));
            // Nobody may be interested any more.
            let _ = sender.send(Some(Arc::new(end)));
        });
        Ok(Self { identity, directory: directory.into(), pidfd: Arc::new(pidfd), ended })
    }

    /// How to find it again.
    pub fn identity(&self) -> VmIdentity {
        self.identity
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Waits until it has ended. Cancel safe.
    pub async fn ended(&self) -> Arc<VmEnd> {
        let mut ended = self.ended.clone();
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        end.unwrap_or_else(|| Arc::new(VmEnd { message: "its watcher failed".to_owned(), console: String::new() }))
    }

    /// How it ended, if it has.
    pub fn end(&self) -> Option<Arc<VmEnd>> {
        self.ended.borrow().clone()
    }

    /// Kills the process.
    pub fn kill(&self) {
        // ESRCH, the only error there can be, says that it has ended.
        let _ = pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL);
    }
}

/// Starts `command` as process 1 of a PID namespace of its own. Such a namespace is for the children of the thread that makes it,
/// which could then start no other thread, so that it is a thread for this alone.
fn spawn_in_pid_namespace(command: &mut Command) -> io::Result<Child> {
    let spawn = || {
        nix::sched::unshare(CloneFlags::CLONE_NEWPID)?;
        command.spawn()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("vmm starter".to_owned()).spawn_scoped(scope, spawn)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
    })
}

/// A child that is killed unless it becomes a [`Vm`].
struct Started {
    child: Option<Child>,
}

impl Started {
    fn watch(mut self, directory: &Path) -> Result<Vm, VmmError> {
        let pid = self.child.as_ref().expect("it was just started").id() as i32;
        let failed = |doing| move |source| VmmError::Process { doing, pid, source };
        let pidfd = open_pidfd(pid).map_err(failed("open a pidfd of"))?;
        let start_time = start_time(pid).map_err(failed("look at"))?;
        Vm::watch(VmIdentity { pid, start_time }, directory, pidfd, self.child.take())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It fails only if the process has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The VM's directory in `parent`, from where the kernel says that its log is; it may be deleted.
fn directory_of(log: &Path, parent: &Path) -> Option<PathBuf> {
    let name = log.file_name()?.to_str()?;
    let directory = log.parent().filter(|directory| directory.parent() == Some(parent))?;
    matches!(name, "vmm.log" | "vmm.log (deleted)").then(|| directory.to_owned())
}

fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("not a pid"))?;
    Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

/// When the process `pid` was started, as in [`VmIdentity`].
pub(crate) fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::other("an unexpected /proc/pid/stat"))
}

fn parse_start_time(stat: &str) -> Option<u64> {
    field(stat, 22)?.parse().ok()
}

/// How a process ended, in words.
fn told(status: ExitStatus) -> String {
    match status.signal() {
        // See `vmm/src/jail/seccomp.rs`.
        Some(SIGSYS) => "the kernel killed it (SIGSYS): it made a system call that its jail does not allow, which the \
                         kernel's log names"
            .to_owned(),
        _ => status.to_string(),
    }
}

fn read_end(path: &Path, status: Option<String>) -> VmEnd {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_EXIT as u64).read_to_end(&mut bytes));
    match read.map(|_| decode_frame::<VmExit>(&bytes, MAX_EXIT)) {
        Ok(Ok(Some((exit, _)))) => {
            let reason = match exit.reason() {
                Reason::Stopped => "it was told to stop",
                Reason::GuestPowerOff => "the guest powered off",
                Reason::GuestCrash => "the guest crashed",
                Reason::BadConfig => "its configuration cannot be run",
                Reason::KvmUnusable => "KVM cannot be used",
                Reason::Internal => "it failed",
            };
            let separator = if exit.message.is_empty() { "" } else { ": " };
            let message: String = exit.message.chars().take(2000).collect();
            VmEnd {
                message: format!("{reason}{separator}{message}"),
                console: console_tail(&exit.console, CONSOLE_LINES),
            }
        }
        _ => {
            let status = status.unwrap_or_else(|| "its status is unknown".to_owned());
            let log = std::fs::read(path.with_file_name("vmm.log")).unwrap_or_default();
            VmEnd { message: format!("it left no exit record; {status}"), console: console_tail(&log, CONSOLE_LINES) }
        }
    }
}

#[cfg(test)]
mod tests {
    use isopod_proto::encode_frame;

    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_process_name() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("17 (a) b (c) S) {}", fields.join(" "));
        assert_eq!(parse_start_time(&stat), Some(22));
        assert_eq!(parse_start_time("17 (x"), None);
    }

    #[test]
    fn a_log_tells_its_vm_only_right_below_the_state_directory() {
        let of = |log: &str| directory_of(Path::new(log), Path::new("/run/isopod/sandboxes"));
        assert_eq!(of("/run/isopod/sandboxes/ab/vmm.log"), Some("/run/isopod/sandboxes/ab".into()));
        assert_eq!(of("/run/isopod/sandboxes/ab/vmm.log (deleted)"), Some("/run/isopod/sandboxes/ab".into()));
        for other in ["/run/isopod/sandboxes/vmm.log", "/run/isopod/sandboxes/ab/c/vmm.log", "/dev/null", "pipe:[1]"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn an_exit_record_is_told_in_words_with_the_console() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("exit");
        let exit = VmExit {
            reason: Reason::GuestCrash.into(),
            message: "triple fault".into(),
            console: b"Kernel panic - not syncing\r\n".to_vec(),
        };
        std::fs::write(&path, encode_frame(&exit)).expect("written");
        let end = read_end(&path, None);
        assert_eq!(end.message, "the guest crashed: triple fault");
        assert_eq!(end.console, "Kernel panic - not syncing");
    }

    #[test]
    fn a_vmm_without_an_exit_record_is_told_by_its_status_and_log() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("vmm.log"), "oh no\n").expect("written");
        std::fs::write(directory.path().join("exit"), b"\xff\xff\xff\xffrubbish").expect("written");
        let end = read_end(&directory.path().join("exit"), Some("signal: 9 (SIGKILL)".into()));
        assert_eq!(
            (end.message.as_str(), end.console.as_str()),
            ("it left no exit record; signal: 9 (SIGKILL)", "oh no")
        );
    }

    #[test]
    fn a_vmm_that_broke_the_rules_of_its_jail_is_told_so() {
        let message = told(ExitStatus::from_raw(SIGSYS));
        assert!(message.contains("SIGSYS") && message.contains("jail"), "{message}");
        assert_eq!(told(ExitStatus::from_raw(9)), "signal: 9 (SIGKILL)");
    }

    #[tokio::test]
    async fn a_process_that_is_found_by_its_identity_is_seen_to_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut child = Command::new("sleep").arg("60").spawn().expect("started");
        let pid = child.id() as i32;
        let identity = VmIdentity { pid, start_time: start_time(pid).expect("it runs") };
        let vm = Vm::find(identity, directory.path()).expect("it runs");
        assert!(vm.end().is_none());
        vm.kill();
        let status = child.wait().expect("reaped");
        assert!(!status.success());
        assert!(vm.ended().await.message.contains("no exit record"));
    }

    #[tokio::test]
    async fn another_process_with_the_same_pid_is_not_taken_for_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let identity = VmIdentity { pid: std::process::id() as i32, start_time: 1 };
        assert!(matches!(Vm::find(identity, directory.path()), Err(VmmError::Gone { .. })));
    }
}
