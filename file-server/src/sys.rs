//! The system calls that have no safe wrapper in rustix or nix. All unsafe code of the crate is here.
#![allow(unsafe_code, reason = "this module exists to hold it")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Adds the attribute bits `set` to the mount `mount` is the root of and gives it the propagation type `propagation` (0: as it
/// is); both to all mounts below too if `recursive`. See mount_setattr(2).
pub fn mount_setattr(mount: BorrowedFd<'_>, set: u64, propagation: u64, recursive: bool) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated constant, and `attr` lives across the call and has the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes ownership of the inherited descriptor `fd` and sets its close-on-exec flag. It must be above the standard streams,
/// and must not be taken twice: the caller keeps track of that.
pub fn take_inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: F_SETFD takes an integer and touches no memory; a number that is no descriptor gives EBADF.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, as fcntl has just shown, and the caller takes each number at most once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets an access to memory that is not there end the process at once, as what it is. std has a handler for it, which tells of stacks that
/// overflow; in a jail it would be killed for the system calls it makes, as if somebody had broken out.
pub fn let_faults_kill() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the default action is no handler, and both signals can have it.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}
