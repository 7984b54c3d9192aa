//! Lists that every program has a use for: what std and glibc do by themselves.

use libc::*;

use super::{Allowed, Filter};

/// Flags with which a clone is a thread and not a process.
const THREAD_FLAGS: u32 = (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD) as u32;
/// Flags that make namespaces.
const NAMESPACE_FLAGS: u32 = CLONE_NEWNS as u32
    | CLONE_NEWCGROUP as u32
    | CLONE_NEWUTS as u32
    | CLONE_NEWIPC as u32
    | CLONE_NEWUSER as u32
    | CLONE_NEWPID as u32
    | CLONE_NEWNET as u32;

/// The signal for which glibc sets a handler when the first thread is started, for changes of the user in all threads.
const SIGSETXID: u32 = 33;

/// The allocator.
const MEMORY: [c_long; 4] = [SYS_brk, SYS_munmap, SYS_mremap, SYS_madvise];
/// Locks and time. The last goes on with a wait that was interrupted.
const WAITS: [c_long; 6] =
    [SYS_futex, SYS_sched_yield, SYS_clock_gettime, SYS_clock_nanosleep, SYS_nanosleep, SYS_restart_syscall];
/// What a thread does at its start, at its end, and when it is kicked.
const LIFE: [c_long; 10] = [
    SYS_rseq,
    SYS_set_robust_list,
    SYS_sched_getaffinity,
    SYS_sigaltstack,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_getpid,
    SYS_gettid,
    SYS_exit,
    SYS_exit_group,
];

/// What runs in every thread, on descriptors that are open and memory without code in it.
pub fn any_thread() -> Allowed {
    Allowed::default()
        .calls(&[SYS_read, SYS_write, SYS_close, SYS_getrandom])
        .calls(&MEMORY)
        .calls(&WAITS)
        .calls(&LIFE)
        .masked(SYS_mmap, 2, PROT_EXEC as u32, 0)
        .masked(SYS_mprotect, 2, PROT_EXEC as u32, 0)
        // std looks whether what it closes is open, in builds for debugging.
        .with(SYS_fcntl, 1, &[F_GETFD as u32])
}

/// What starting threads takes, and putting them under filters of their own; to be used beside [`no_clone3`].
pub fn starting_threads() -> Allowed {
    Allowed::default()
        // clone3, whose flags no filter sees, is refused as unknown, and glibc uses clone.
        .calls(&[SYS_clone3])
        .masked(SYS_clone, 0, THREAD_FLAGS | NAMESPACE_FLAGS, THREAD_FLAGS)
        .with(SYS_rt_sigaction, 0, &[SIGSETXID])
        .with(SYS_prctl, 0, &[PR_SET_NAME as u32, PR_SET_NO_NEW_PRIVS as u32])
        .with(SYS_seccomp, 0, &[SECCOMP_SET_MODE_FILTER])
}

/// Makes clone3 unknown, so that glibc uses clone.
pub fn no_clone3() -> Filter {
    Filter::refusing(SYS_clone3, ENOSYS as u32)
}
