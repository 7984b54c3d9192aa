//! The system calls that have no safe wrapper in rustix or nix. All unsafe code of the crate is here.
#![allow(unsafe_code, reason = "this module exists to hold it")]

pub mod bpf;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// Which process the return from [`clone_sibling`] happened in.
#[derive(Debug)]
pub enum Cloned {
    /// The caller; the number is the new process's id as the caller's PID namespace sees it.
    Caller(i32),
    /// The new process.
    New,
}

/// Makes a copy of the calling process that is a child of the caller's parent (`CLONE_PARENT`) and starts its life in
/// `cgroup`. With `new_pid_namespace` it is process 1 of a PID namespace of its own.
///
/// The caller must have one thread only; the agent's stubs have.
pub fn clone_sibling(cgroup: BorrowedFd<'_>, new_pid_namespace: bool) -> io::Result<Cloned> {
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    const CLONE_PARENT: u64 = 0x8000;
    const CLONE_NEWPID: u64 = 0x2000_0000;
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let flags = CLONE_PARENT | CLONE_INTO_CGROUP | if new_pid_namespace { CLONE_NEWPID } else { 0 };
    // CLONE_PARENT takes the exit signal of the caller, SIGCHLD, and wants 0 here.
    let arguments = CloneArgs {
        flags,
        cgroup: u64::try_from(cgroup.as_raw_fd()).expect("a borrowed descriptor is not negative"),
        ..CloneArgs::default()
    };
    // SAFETY: `arguments` lives across the call and has the size given. There is no CLONE_VM, so the new process has its own
    // copy of the memory, and the caller has one thread, so no lock is held in that copy.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArgs>()) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::New),
        pid => Ok(Cloned::Caller(i32::try_from(pid).expect("a process id fits an i32"))),
    }
}

/// Attributes of a mount, see mount_setattr(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountAttributes {
    /// No writing through this mount.
    pub readonly: bool,
    /// Set-user-id bits do not count.
    pub nosuid: bool,
    /// Device nodes do not open.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
}

/// Lets the files of the mount `mount` is the root of, which must not be attached yet, belong to whom they belong to in
/// `user_namespace`.
pub fn idmap(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let userns_fd = u64::try_from(user_namespace.as_raw_fd()).expect("a borrowed descriptor is not negative");
    change_mount(
        mount,
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd },
        0,
    )
}

/// Adds `attributes` to the mount `mount` is the root of, and to all below it if `recursive`.
pub fn mount_setattr(mount: BorrowedFd<'_>, attributes: MountAttributes, recursive: bool) -> io::Result<()> {
    let MountAttributes { readonly, nosuid, nodev, noexec } = attributes;
    let bit = |on: bool, bit: u64| if on { bit } else { 0 };
    let attr_set = bit(readonly, libc::MOUNT_ATTR_RDONLY)
        | bit(nosuid, libc::MOUNT_ATTR_NOSUID)
        | bit(nodev, libc::MOUNT_ATTR_NODEV)
        | bit(noexec, libc::MOUNT_ATTR_NOEXEC);
    let attr = libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    change_mount(mount, attr, if recursive { libc::AT_RECURSIVE } else { 0 })
}

fn change_mount(mount: BorrowedFd<'_>, attr: libc::mount_attr, flags: i32) -> io::Result<()> {
    // SAFETY: the path is a NUL-terminated constant, and `attr` lives across the call and has the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags | libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bytes of `struct dm_ioctl`.
pub const DM_IOCTL_SIZE: usize = 312;

/// An ioctl of device-mapper, the one with number `command`. `request` begins with a `struct dm_ioctl`, which the answer overwrites.
///
/// # Errors
/// `InvalidInput` if the structure does not say that `request` is as long as it is; otherwise what the kernel gives.
pub fn device_mapper(control: BorrowedFd<'_>, command: u8, request: &mut [u8]) -> io::Result<()> {
    /// `_IOWR(DM_IOCTL, command, struct dm_ioctl)`.
    const GROUP: u64 = 3 << 30 | (DM_IOCTL_SIZE as u64) << 16 | 0xfd << 8;
    let stated = request.get(12..16).and_then(|bytes| bytes.first_chunk()).map(|bytes| u32::from_ne_bytes(*bytes));
    if request.len() < DM_IOCTL_SIZE || stated.is_none_or(|stated| stated as usize != request.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel reads and writes at most as many bytes as `data_size` says, which were checked to be those of `request`,
    // and at least a `struct dm_ioctl`, which `request` was checked to hold.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), GROUP | u64::from(command), request.as_mut_ptr()) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Marks every descriptor from `first` on to be closed by execve.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: close_range with CLOSE_RANGE_CLOEXEC changes flags only; no descriptor is closed under its owner.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives every signal its default action and unblocks all of them.
pub fn reset_signals() {
    // struct kernel_sigaction of x86-64: handler (0 is SIG_DFL), flags, restorer, mask. glibc's own call leaves out the two
    // signals that it keeps for itself.
    let default = [0u64; 4];
    let no_old = std::ptr::null_mut::<u64>();
    for signal in 1..=64 {
        // SAFETY: `default` has the size of the kernel's structure, and SIG_DFL installs no handler. SIGKILL and SIGSTOP are
        // refused with EINVAL, which is as it should be.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), no_old, size_of::<u64>()) };
    }
    // SAFETY: an all-zero sigset_t is a valid value for sigemptyset to overwrite.
    let mut none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `none` is a sigset_t that we own.
    unsafe { libc::sigemptyset(&raw mut none) };
    // SAFETY: `none` was initialised by sigemptyset; the old mask is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
}

/// Ignores SIGCHLD, so that the kernel reaps this process's children.
pub fn ignore_child_signals() {
    // SAFETY: SIG_IGN installs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Size of one `struct sock_filter`.
const SOCK_FILTER_SIZE: usize = 8;

/// Installs a classic BPF program, an array of `struct sock_filter`, as the seccomp filter of this process, with the flags of
/// seccomp(2).
///
/// # Errors
/// `InvalidInput` for a program whose length is not a number of instructions; otherwise what seccomp(2) gives.
pub fn install_seccomp(filter: &[u8], flags: u32) -> io::Result<()> {
    let instructions: Vec<libc::sock_filter> = filter
        .chunks_exact(SOCK_FILTER_SIZE)
        .map(|chunk| libc::sock_filter {
            code: u16::from_ne_bytes([chunk[0], chunk[1]]),
            jt: chunk[2],
            jf: chunk[3],
            k: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        })
        .collect();
    let whole = filter.len().is_multiple_of(SOCK_FILTER_SIZE);
    let (true, Ok(len)) = (whole, u16::try_from(instructions.len())) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let program = libc::sock_fprog { len, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: `program` points to `len` instructions, which live across the call; the kernel checks the program itself.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// execve(2): returns only if it failed.
pub fn execve(path: &CString, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // SAFETY: `path` and every element of the two arrays are NUL-terminated, and both arrays end with a null pointer.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Sends the signal with this number, real-time signals included, to the process of `pidfd`.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let information = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo asks the kernel to fill it in as kill(2) does.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, information, 0) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends the signal with this number to the process `pid`, which must be positive.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: kill(2) takes numbers only.
    let result = unsafe { libc::kill(pid, signal) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a descriptor with the runtime.
pub fn register(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same open descriptor for all of its life, and nothing here replaces it.
    let registered = unsafe { AsyncFd::register(descriptor) };
    registered.map_err(io::Error::from)
}

/// Keeps glibc from giving each thread a heap of its own: the agent's threads are few and short, its memory is the pod's.
pub fn use_one_heap() {
    // SAFETY: mallopt changes parameters of the allocator only.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
