//! Namespaces, and a root with nothing in it.

use std::os::fd::{AsFd, OwnedFd};

use nix::sched::CloneFlags;
use rustix::fs::CWD;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags};

use crate::JailError;

/// Enters mount, network, IPC, UTS and cgroup namespaces of its own, from whose mounts nothing spreads to the host's. The
/// network namespace has a loopback interface that is down; the cgroup namespace begins at the cgroup the process is in. A PID
/// namespace is for children only, and so the parent's to make.
pub fn leave_namespaces() -> Result<(), JailError> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    nix::sched::unshare(flags).map_err(JailError::of("make namespaces"))?;
    let separate = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", separate).map_err(JailError::of("separate the mounts from the host's"))
}

/// A new file system of `kind` with `options`, and `attributes` besides nosuid, nodev and noexec; mounted nowhere.
pub fn new_filesystem(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(&context, *key, *value)?;
    }
    rustix::mount::fsconfig_create(&context)?;
    let attributes = attributes
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Makes `root`, which is mounted nowhere yet, the root of the mount namespace, and detaches everything else. All processes in the
/// namespace get it.
pub fn enter_empty_root(root: &OwnedFd) -> rustix::io::Result<()> {
    // Any directory will do; this one is there.
    let place = "/proc";
    rustix::mount::move_mount(root, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    rustix::process::fchdir(root.as_fd())?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}
