//! What planted code tries.

use std::fmt;

use libc::*;

use crate::sys::Argument::{Bytes, Number as N, Text};
use crate::sys::{self, Argument};

/// What is outside of the jail and would be in reach without it.
pub struct Outside {
    /// A process, the test's own.
    pub pid: u32,
    /// The name of an abstract socket that somebody listens on.
    pub socket: String,
    /// A TCP port of the loopback address that somebody listens on.
    pub port: u16,
}

impl fmt::Display for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.pid, self.socket, self.port)
    }
}

impl Outside {
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (pid, socket, port) = (words.next()?, words.next()?, words.next()?);
        Some(Self { pid: pid.parse().ok()?, socket: socket.to_owned(), port: port.parse().ok()? })
    }
}

/// One thing to try.
pub struct Attempt {
    pub name: &'static str,
    /// The errors it gets in a jail without filters of system calls, where it succeeds outside; `None`: filters alone prevent it,
    /// or it is not to be done outside.
    pub without_filter: Option<&'static [i32]>,
    pub call: fn(&Outside) -> Result<(), i32>,
}

fn done(number: i64, arguments: &mut [Argument<'_>]) -> Result<(), i32> {
    sys::call(number, arguments).map(drop)
}

const fn held(name: &'static str, errors: &'static [i32], call: fn(&Outside) -> Result<(), i32>) -> Attempt {
    Attempt { name, without_filter: Some(errors), call }
}

const fn filtered(name: &'static str, call: fn(&Outside) -> Result<(), i32>) -> Attempt {
    Attempt { name, without_filter: None, call }
}

/// Flags of a thread.
const THREAD: i64 = (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD) as i64;

const CWD: Argument<'_> = N(AT_FDCWD as i64);
const DIRECTORY: i64 = (O_RDONLY | O_DIRECTORY) as i64;
const TEMPORARY: i64 = (O_RDWR | O_TMPFILE) as i64;

/// struct sockaddr_un of the abstract socket `name`, and its length.
fn abstract_address(name: &str) -> (Vec<u8>, i64) {
    let mut address = (AF_UNIX as u16).to_ne_bytes().to_vec();
    address.push(0);
    address.extend(name.as_bytes());
    let length = address.len() as i64;
    (address, length)
}

fn connect(family: c_int, mut address: Vec<u8>, length: i64) -> Result<(), i32> {
    let socket = sys::call(SYS_socket, &mut [N(family.into()), N(SOCK_STREAM.into()), N(0)])?;
    done(SYS_connect, &mut [N(socket), Bytes(&mut address), N(length)])
}

fn connect_tcp(outside: &Outside) -> Result<(), i32> {
    let mut address = (AF_INET as u16).to_ne_bytes().to_vec();
    address.extend(outside.port.to_be_bytes());
    address.extend([127, 0, 0, 1]);
    address.resize(16, 0);
    connect(AF_INET, address, 16)
}

pub const ATTEMPTS: &[Attempt] = &[
    // Files.
    held("open-root", &[EACCES], |_| done(SYS_openat, &mut [CWD, Text(c"/"), N(DIRECTORY)])),
    held("open-passwd", &[ENOENT, EACCES], |_| done(SYS_openat, &mut [CWD, Text(c"/etc/passwd"), N(0)])),
    held("open-proc", &[ENOENT, EACCES], |_| done(SYS_open, &mut [Text(c"/proc/self/status"), N(0)])),
    held("make-file", &[EROFS, EACCES, ENOENT], |_| {
        done(SYS_openat, &mut [CWD, Text(c"/tmp"), N(TEMPORARY), N(0o600)])
    }),
    filtered("memfd", |_| done(SYS_memfd_create, &mut [Text(c"x"), N(0)])),
    filtered("chroot", |_| done(SYS_chroot, &mut [Text(c"/")])),
    filtered("ftruncate", |_| done(SYS_ftruncate, &mut [N(0), N(0)])),
    // The network.
    held("connect-tcp", &[EACCES, ENETUNREACH], connect_tcp),
    held("connect-abstract", &[EPERM, ECONNREFUSED], |outside| {
        let (address, length) = abstract_address(&outside.socket);
        connect(AF_UNIX, address, length)
    }),
    filtered("socket-unix", |_| done(SYS_socket, &mut [N(AF_UNIX.into()), N(SOCK_STREAM.into()), N(0)])),
    filtered("socket-packet", |_| done(SYS_socket, &mut [N(AF_PACKET.into()), N(SOCK_RAW.into()), N(0)])),
    filtered("connect", |_| done(SYS_connect, &mut [N(0), N(0), N(0)])),
    filtered("bind", |_| done(SYS_bind, &mut [N(0), N(0), N(0)])),
    filtered("sendmsg", |_| done(SYS_sendmsg, &mut [N(0), N(0), N(0)])),
    // Programs and processes.
    held("execute", &[ENOENT, EACCES], |_| {
        // As any program but that it says so at its end.
        let script = c"exit 200";
        let arguments = [c"sh".as_ptr() as u64, c"-c".as_ptr() as u64, script.as_ptr() as u64, 0];
        let mut vector: Vec<u8> = arguments.iter().flat_map(|pointer| pointer.to_ne_bytes()).collect();
        done(SYS_execve, &mut [Text(c"/bin/sh"), Bytes(&mut vector), N(0)])
    }),
    filtered("execute-descriptor", |_| done(SYS_execveat, &mut [N(0), Text(c""), N(0), N(0), N(AT_EMPTY_PATH.into())])),
    filtered("fork", |_| done(SYS_clone, &mut [N(SIGCHLD.into()), N(0), N(0), N(0), N(0)])),
    filtered("vfork", |_| done(SYS_vfork, &mut [])),
    held("trace", &[EPERM, ESRCH, EACCES], |outside| {
        done(SYS_ptrace, &mut [N(PTRACE_SEIZE.into()), N(outside.pid.into()), N(0), N(0)])
    }),
    filtered("read-process", |outside| {
        done(SYS_process_vm_readv, &mut [N(outside.pid.into()), N(0), N(0), N(0), N(0), N(0)])
    }),
    held("signal", &[EPERM, ESRCH], |outside| done(SYS_kill, &mut [N(outside.pid.into()), N(0)])),
    filtered("signal-thread", |outside| done(SYS_tkill, &mut [N(outside.pid.into()), N(0)])),
    filtered("signal-group", |outside| {
        done(SYS_tgkill, &mut [N(outside.pid.into()), N(outside.pid.into()), N(SIGKILL.into())])
    }),
    filtered("pidfd", |outside| done(SYS_pidfd_open, &mut [N(outside.pid.into()), N(0)])),
    // Privileges.
    held("become-root", &[EPERM], |_| done(SYS_setuid, &mut [N(0)])),
    held("namespace", &[EPERM], |_| done(SYS_unshare, &mut [N(CLONE_NEWUTS.into())])),
    filtered("user-namespace", |_| done(SYS_unshare, &mut [N(CLONE_NEWUSER.into())])),
    filtered("setns", |_| done(SYS_setns, &mut [N(0), N(0)])),
    held("new-filesystem", &[EPERM], |_| done(SYS_fsopen, &mut [Text(c"tmpfs"), N(0)])),
    filtered("mount", |_| {
        done(SYS_mount, &mut [N(0), Text(c"/"), N(0), N(MS_RDONLY as i64 | MS_REMOUNT as i64), N(0)])
    }),
    filtered("umount", |_| done(SYS_umount2, &mut [Text(c"/nowhere"), N(0)])),
    filtered("pivot-root", |_| done(SYS_pivot_root, &mut [Text(c"/nowhere"), Text(c"/nowhere")])),
    filtered("capset", |_| done(SYS_capset, &mut [N(0), N(0)])),
    filtered("dumpable", |_| done(SYS_prctl, &mut [N(PR_SET_DUMPABLE.into()), N(1), N(0), N(0), N(0)])),
    filtered("limits", |_| done(SYS_prlimit64, &mut [N(0), N(0), N(0), N(0)])),
    held("nice", &[EPERM, EACCES], |_| done(SYS_setpriority, &mut [N(PRIO_PROCESS.into()), N(0), N(-5)])),
    // The kernel's larger surfaces.
    filtered("bpf", |_| done(SYS_bpf, &mut [N(0), N(0), N(0)])),
    filtered("perf", |_| done(SYS_perf_event_open, &mut [N(0), N(0), N(0), N(0), N(0)])),
    filtered("keys", |_| done(SYS_keyctl, &mut [N(0), N(0), N(0), N(0), N(0)])),
    filtered("io-uring", |_| done(SYS_io_uring_setup, &mut [N(0), N(0)])),
    filtered("userfaultfd", |_| done(SYS_userfaultfd, &mut [N(0)])),
    filtered("module", |_| done(SYS_init_module, &mut [N(0), N(0), Text(c"")])),
    filtered("terminal-ioctl", |_| done(SYS_ioctl, &mut [N(0), N(TIOCSTI as i64), N(0)])),
    filtered("make-vm", |_| done(SYS_ioctl, &mut [N(0), N(0xae01), N(0)])),
    filtered("code-in-memory", |_| {
        let protection = i64::from(PROT_READ | PROT_WRITE | PROT_EXEC);
        done(SYS_mmap, &mut [N(0), N(4096), N(protection), N((MAP_PRIVATE | MAP_ANONYMOUS).into()), N(-1), N(0)])
    }),
];

/// What the workers of devices may do, or what it takes to start them, and vCPUs may not.
pub const OF_WORKERS: &[Attempt] = &[
    // On a stack that is none, so that it would not live long.
    filtered("thread", |_| done(SYS_clone, &mut [N(THREAD), N(8), N(0), N(0), N(0)])),
    filtered("seccomp", |_| done(SYS_seccomp, &mut [N(i64::from(SECCOMP_SET_MODE_FILTER)), N(0), N(0)])),
    filtered("read-disk", |_| done(SYS_preadv, &mut [N(0), N(0), N(0), N(0), N(0)])),
    filtered("write-disk", |_| done(SYS_pwritev, &mut [N(0), N(0), N(0), N(0), N(0)])),
    filtered("discard", |_| done(SYS_fallocate, &mut [N(0), N(0), N(0), N(0)])),
    filtered("send-packet", |_| done(SYS_writev, &mut [N(0), N(0), N(0)])),
    filtered("accept", |_| done(SYS_accept4, &mut [N(0), N(0), N(0), N(0)])),
    filtered("send", |_| done(SYS_sendto, &mut [N(0), N(0), N(0), N(0), N(0), N(0)])),
    filtered("receive", |_| done(SYS_recvfrom, &mut [N(0), N(0), N(0), N(0), N(0), N(0)])),
    filtered("wait", |_| done(SYS_epoll_create1, &mut [N(0)])),
];
