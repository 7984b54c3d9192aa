//! The profile RuntimeDefault: what programs in containers are known to need is allowed, all else fails with EPERM.
//!
//! It allows what the default profiles of other runtimes allow, so that what runs there runs here: new objects and their
//! use freely; what reaches the kernel's administration only with the capability it is about, although the kernel asks for
//! that one too (a user namespace, in which a program would have it, cannot be made without CAP_SYS_ADMIN). Not allowed to
//! anybody: loading another kernel, kernel keyrings, io_uring, userfaultfd, AF_VSOCK, which in a guest leads to the host.

use super::profile::{Action, Condition, Operator, Profile, Rule};

/// Allowed with any arguments.
#[rustfmt::skip]
const ALLOWED: &[&str] = &[
    // Files and directories.
    "access", "chdir", "chmod", "chown", "chown32", "close", "close_range", "copy_file_range", "creat", "dup", "dup2",
    "dup3", "faccessat", "faccessat2", "fadvise64", "fadvise64_64", "fallocate", "fchdir", "fchmod", "fchmodat",
    "fchmodat2", "fchown", "fchown32", "fchownat", "fcntl", "fcntl64", "fdatasync", "fgetxattr", "flistxattr", "flock",
    "fremovexattr", "fsetxattr", "fstat", "fstat64", "fstatat64", "fstatfs", "fstatfs64", "fsync", "ftruncate",
    "ftruncate64", "futimesat", "getcwd", "getdents", "getdents64", "getxattr", "getxattrat", "ioctl", "lchown",
    "lchown32", "lgetxattr", "link", "linkat", "listxattr", "listxattrat", "llistxattr", "_llseek", "lremovexattr",
    "lseek", "lsetxattr", "lstat", "lstat64", "mkdir", "mkdirat", "mknod", "mknodat", "name_to_handle_at", "newfstatat",
    "open", "openat", "openat2", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "read", "readahead",
    "readdir", "readlink", "readlinkat", "readv", "removexattr", "removexattrat", "rename", "renameat", "renameat2",
    "rmdir", "sendfile", "sendfile64", "setxattr", "setxattrat", "splice", "stat", "stat64", "statfs", "statfs64", "statx",
    "symlink", "symlinkat", "sync", "sync_file_range", "syncfs", "tee", "truncate", "truncate64", "umask", "unlink",
    "unlinkat", "utime", "utimensat", "utimensat_time64", "utimes", "vmsplice", "write", "writev", "statmount",
    "listmount",
    // Asynchronous and event interfaces.
    "epoll_create", "epoll_create1", "epoll_ctl", "epoll_ctl_old", "epoll_pwait", "epoll_pwait2", "epoll_wait",
    "epoll_wait_old", "eventfd", "eventfd2", "fanotify_mark", "inotify_add_watch", "inotify_init", "inotify_init1",
    "inotify_rm_watch", "io_cancel", "io_destroy", "io_getevents", "io_pgetevents", "io_pgetevents_time64", "io_setup",
    "io_submit", "_newselect", "pipe", "pipe2", "poll", "ppoll", "ppoll_time64", "pselect6", "pselect6_time64", "select",
    "signalfd", "signalfd4",
    // Memory.
    "brk", "cachestat", "get_thread_area", "madvise", "map_shadow_stack", "membarrier", "memfd_create", "memfd_secret",
    "mincore", "mlock", "mlock2", "mlockall", "mmap", "mmap2", "mprotect", "mremap", "mseal", "msync", "munlock",
    "munlockall", "munmap", "pkey_alloc", "pkey_free", "pkey_mprotect", "process_mrelease", "remap_file_pages",
    "set_thread_area",
    // Processes, threads, signals, scheduling.
    "alarm", "arch_prctl", "capget", "capset", "execve", "execveat", "exit", "exit_group", "fork", "futex",
    "futex_requeue", "futex_time64", "futex_wait", "futex_waitv", "futex_wake", "get_robust_list", "getcpu", "getegid",
    "getegid32", "geteuid", "geteuid32", "getgid", "getgid32", "getgroups", "getgroups32", "getpgid", "getpgrp", "getpid",
    "getppid", "getpriority", "getresgid", "getresgid32", "getresuid", "getresuid32", "getrlimit", "getrusage", "getsid",
    "gettid", "getuid", "getuid32", "ioprio_get", "ioprio_set", "kill", "landlock_add_rule", "landlock_create_ruleset",
    "landlock_restrict_self", "modify_ldt", "nice", "pause", "pidfd_open", "pidfd_send_signal", "prctl", "prlimit64",
    "process_vm_readv", "process_vm_writev", "ptrace", "restart_syscall", "rseq", "rt_sigaction", "rt_sigpending",
    "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_sigtimedwait_time64",
    "rt_tgsigqueueinfo", "sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr",
    "sched_getparam", "sched_getscheduler", "sched_rr_get_interval", "sched_rr_get_interval_time64",
    "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler", "sched_yield", "seccomp",
    "set_robust_list", "set_tid_address", "setfsgid", "setfsgid32", "setfsuid", "setfsuid32", "setgid", "setgid32",
    "setgroups", "setgroups32", "setpgid", "setpriority", "setregid", "setregid32", "setresgid", "setresgid32",
    "setresuid", "setresuid32", "setreuid", "setreuid32", "setrlimit", "setsid", "setuid", "setuid32", "sigaction",
    "sigaltstack", "signal", "sigpending", "sigprocmask", "sigreturn", "sigsuspend", "tgkill", "times", "tkill",
    "ugetrlimit", "uretprobe", "vfork", "wait4", "waitid", "waitpid",
    // Time.
    "adjtimex", "clock_adjtime", "clock_adjtime64", "clock_getres", "clock_getres_time64", "clock_gettime",
    "clock_gettime64", "clock_nanosleep", "clock_nanosleep_time64", "getitimer", "gettimeofday", "nanosleep",
    "setitimer", "time", "timer_create", "timer_delete", "timer_getoverrun", "timer_gettime", "timer_gettime64",
    "timer_settime", "timer_settime64", "timerfd_create", "timerfd_gettime", "timerfd_gettime64", "timerfd_settime",
    "timerfd_settime64",
    // Sockets. socketcall is how old 32-bit programs make every one of these; a filter cannot see what it carries.
    "accept", "accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "listen", "recv", "recvfrom",
    "recvmmsg", "recvmmsg_time64", "recvmsg", "send", "sendmmsg", "sendmsg", "sendto", "setsockopt", "shutdown",
    "socketcall", "socketpair",
    // System V and POSIX interprocess communication.
    "ipc", "mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive", "mq_timedreceive_time64", "mq_timedsend",
    "mq_timedsend_time64", "mq_unlink", "msgctl", "msgget", "msgrcv", "msgsnd", "semctl", "semget", "semop",
    "semtimedop", "semtimedop_time64", "shmat", "shmctl", "shmdt", "shmget",
    // The system.
    "getrandom", "sysinfo", "uname", "lsm_get_self_attr", "lsm_set_self_attr", "lsm_list_modules",
];

/// Allowed with a capability.
#[rustfmt::skip]
const WITH_CAPABILITY: &[(&str, &[&str])] = &[
    ("CAP_BPF", &["bpf"]),
    ("CAP_DAC_READ_SEARCH", &["open_by_handle_at"]),
    ("CAP_PERFMON", &["perf_event_open"]),
    (
        "CAP_SYS_ADMIN",
        &[
            "bpf", "clone", "clone3", "fanotify_init", "fsconfig", "fsmount", "fsopen", "fspick", "lookup_dcookie",
            "mount", "mount_setattr", "move_mount", "open_tree", "open_tree_attr", "perf_event_open", "pivot_root",
            "quotactl", "quotactl_fd", "setdomainname", "sethostname", "setns", "syslog", "umount", "umount2", "unshare",
        ],
    ),
    ("CAP_SYS_BOOT", &["reboot"]),
    ("CAP_SYS_CHROOT", &["chroot"]),
    ("CAP_SYS_MODULE", &["delete_module", "finit_module", "init_module"]),
    ("CAP_SYS_NICE", &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    ("CAP_SYS_PACCT", &["acct"]),
    ("CAP_SYS_PTRACE", &["kcmp", "pidfd_getfd", "process_madvise"]),
    ("CAP_SYS_RAWIO", &["ioperm", "iopl"]),
    ("CAP_SYS_TIME", &["clock_settime", "clock_settime64", "settimeofday", "stime"]),
    ("CAP_SYS_TTY_CONFIG", &["vhangup"]),
    ("CAP_SYSLOG", &["syslog"]),
];

/// CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
const AF_VSOCK: u64 = 40;
/// What personality(2) may set: PER_LINUX, PER_LINUX32, UNAME26 with each, and "tell me only".
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
const EPERM: u16 = 1;
const ENOSYS: u16 = 38;

/// The profile for a container with the capabilities ("CAP_…") that `granted` tells.
pub fn profile(granted: &dyn Fn(&str) -> bool) -> Profile {
    let mut rules = vec![rule(ALLOWED, Action::Allow, None)];
    for (capability, names) in WITH_CAPABILITY {
        if granted(capability) {
            rules.push(rule(names, Action::Allow, None));
        }
    }
    if !granted("CAP_SYS_ADMIN") {
        let no_namespaces = Operator::MaskedEqual { mask: NEW_NAMESPACES, value: 0 };
        rules.push(rule(&["clone"], Action::Allow, Some(no_namespaces)));
        // Its flags are in memory, where a filter does not see them. C libraries then take clone.
        rules.push(rule(&["clone3"], Action::Errno(ENOSYS), None));
    }
    rules.push(rule(&["socket"], Action::Allow, Some(Operator::NotEqual(AF_VSOCK))));
    for personality in PERSONALITIES {
        rules.push(rule(&["personality"], Action::Allow, Some(Operator::Equal(personality))));
    }
    Profile { default: Action::Errno(EPERM), x86: true, flags: 0, rules }
}

/// A rule, if `operator` is given with that condition on the first argument.
fn rule(names: &[&str], action: Action, operator: Option<Operator>) -> Rule {
    let conditions = operator.into_iter().map(|operator| Condition { index: 0, operator }).collect();
    Rule { names: names.iter().map(|&name| name.to_owned()).collect(), action, conditions }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::seccomp::table;

    #[test]
    fn every_name_is_a_system_call() {
        for name in ALLOWED.iter().chain(WITH_CAPABILITY.iter().flat_map(|(_, names)| names.iter())) {
            assert!(table::exists(name), "{name}");
        }
    }

    #[test]
    fn what_needs_a_capability_is_not_allowed_without() {
        for name in WITH_CAPABILITY.iter().flat_map(|(_, names)| names.iter()) {
            assert!(!ALLOWED.contains(name), "{name}");
        }
    }

    #[test]
    fn what_nobody_may_do_is_in_no_list() {
        let profile = profile(&|_| true);
        let all: Vec<&str> = profile.rules.iter().flat_map(|rule| &rule.names).map(String::as_str).collect();
        for name in ["io_uring_setup", "keyctl", "kexec_load", "userfaultfd", "add_key", "swapon", "vserver"] {
            assert!(!all.contains(&name), "{name}");
        }
    }
}
