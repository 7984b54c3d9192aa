//! The first milliseconds of process 1: file systems, cgroups, the loopback interface.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};
use rustix::process::{Resource, Rlimit};

use crate::error::{Context as _, Result};
use crate::layout::Layout;
use crate::netlink::Netlink;

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// What is mounted in the guest: type, place, options, flags.
const MOUNTS: [(&str, &str, &std::ffi::CStr, MountFlags); 8] = [
    ("proc", "/proc", c"", SAFE),
    ("sysfs", "/sys", c"", SAFE),
    ("devtmpfs", "/dev", c"mode=0755", MountFlags::NOSUID),
    ("devpts", "/dev/pts", c"mode=0620,gid=5,ptmxmode=0666", MountFlags::NOSUID.union(MountFlags::NOEXEC)),
    ("tmpfs", "/dev/shm", c"mode=1777", SAFE),
    ("mqueue", "/dev/mqueue", c"", SAFE),
    ("tmpfs", "/run", c"mode=0755", MountFlags::NOSUID.union(MountFlags::NODEV)),
    ("cgroup2", "/sys/fs/cgroup", c"", SAFE),
];

/// Descriptors that a process may have open, for the agent and, by inheritance, for containers.
const OPEN_FILES: u64 = 1_048_576;

/// Brings the guest up.
pub fn set_up(layout: &Layout) -> Result<()> {
    leave_initial_root()?;
    for (kind, place, options, flags) in MOUNTS {
        let text = || format!("mount {kind} at {place}");
        fs::create_dir_all(place).context(text)?;
        rustix::mount::mount(kind, place, kind, flags, options).context(text)?;
    }
    for (target, link) in [("/proc/self/fd", "/dev/fd"), ("pts/ptmx", "/dev/ptmx")] {
        let _ = fs::remove_file(link);
        symlink(target, link).context(|| format!("make the link {link}"))?;
    }
    make_directories(layout)?;
    set_up_cgroups(layout.cgroup_parent())?;
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    rustix::process::setrlimit(Resource::Nofile, limit).context(|| "raise the limit of open files")?;
    let mut netlink = Netlink::open().context(|| "open a netlink socket")?;
    // The loopback interface is the first of every network namespace.
    netlink.set_up(1).context(|| "switch on the loopback interface")
}

/// The initial root file system cannot be pivoted away from. A second mount of it over itself can, and stubs inherit that.
fn leave_initial_root() -> Result<()> {
    let text = || "mount the root file system over itself";
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = rustix::mount::open_tree(rustix::fs::CWD, "/", flags).context(text)?;
    let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&clone, "", rustix::fs::CWD, "/", attach).context(text)?;
    rustix::process::fchdir(&clone).context(text)?;
    rustix::process::chroot(".").context(text)
}

/// The agent's own directories.
pub fn make_directories(layout: &Layout) -> Result<()> {
    for directory in layout.directories() {
        fs::create_dir_all(&directory).context(|| format!("make {}", directory.display()))?;
    }
    Ok(())
}

/// The agent into a cgroup of its own, every controller there is for the containers.
fn set_up_cgroups(parent: &Path) -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let own = root.join("agent");
    fs::create_dir(&own).context(|| "make the agent's cgroup")?;
    fs::write(own.join("cgroup.procs"), "0").context(|| "enter the agent's cgroup")?;
    fs::create_dir(parent).context(|| "make the containers' cgroup")?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).context(|| "read the controllers")?;
    let enable: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    for directory in [root, parent] {
        fs::write(directory.join("cgroup.subtree_control"), enable.join(" "))
            .context(|| format!("enable {} in {}", enable.join(" "), directory.display()))?;
    }
    Ok(())
}
