//! The system calls of the server: what it does with files, on descriptors and by names below them, and with its two sockets.

use std::io;

use isopod_jail::seccomp::{Allowed, Filter, lists};
use libc::*;

/// What is done with files that are open, or that are named relative to a directory that is.
const FILES: [c_long; 27] = [
    SYS_openat,
    SYS_readlinkat,
    SYS_statx,
    SYS_fstat,
    SYS_newfstatat,
    SYS_fstatfs,
    SYS_fchownat,
    SYS_fchmodat,
    SYS_utimensat,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_lseek,
    SYS_pread64,
    SYS_pwrite64,
    SYS_fsync,
    SYS_fdatasync,
    SYS_getdents64,
    SYS_mknodat,
    SYS_mkdirat,
    SYS_symlinkat,
    SYS_linkat,
    SYS_unlinkat,
    SYS_renameat2,
    SYS_fsetxattr,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_fremovexattr,
];

fn worker() -> Allowed {
    lists::any_thread().calls(&FILES).calls(&[SYS_recvfrom, SYS_sendto, SYS_shutdown])
}

/// The filters.
pub struct Filters {
    first: Filter,
    worker: Filter,
}

impl Filters {
    /// Makes them ready.
    pub fn compile() -> Self {
        Self { first: worker().and(&lists::starting_threads()).or_kill(), worker: worker().or_kill() }
    }

    /// Confines the first thread, which starts the others.
    pub fn confine_first(&self) -> io::Result<()> {
        lists::no_clone3().apply()?;
        self.first.apply()
    }

    /// Confines a thread that has just started.
    ///
    /// # Panics
    ///
    /// If the kernel refuses, which it did not for the first thread: it must not run unconfined.
    pub fn confine_worker(&self) {
        self.worker.apply().expect("the kernel takes a filter that is valid");
    }
}
