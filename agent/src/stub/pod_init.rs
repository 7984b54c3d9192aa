//! Process 1 of the PID namespace that the containers of a pod share: it reaps, and holds nothing anybody could want.

use rustix::process::pivot_root;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::channel::Channel;
use super::message::{Event, FilesystemOption};
use super::{mounts, report};
use crate::error::{Context as _, Result};

/// Gives up the agent's mounts and all capabilities, reports ready, and reaps for ever.
pub fn run(channel: &mut Channel, mount_point: &str) -> Result<()> {
    mounts::new_namespaces(false)?;
    mounts::new_mount_namespace()?;
    let option = |key: &str, value: &str| FilesystemOption { key: key.into(), value: value.into() };
    let options = [option("size", "4096"), option("mode", "0555")];
    let empty = mounts::new_filesystem("tmpfs", &options, rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    mounts::attach_at_path(&empty, mount_point)?;
    rustix::process::fchdir(&empty).context(|| "enter the empty root")?;
    pivot_root(".", ".").context(|| "make the empty directory the root")?;
    rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH).context(|| "detach the agent's root")?;

    report(channel, Event::Ready(false), &[])?;
    if !super::wait_for_go(channel)? {
        return Ok(());
    }
    report(channel, Event::Executing(true), &[])?;
    crate::sys::close_on_exec_from(0).context(|| "mark descriptors")?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).context(|| "drop all capabilities")?;
    rustix::net::shutdown(&*channel, rustix::net::Shutdown::Both).context(|| "close the socket to the agent")?;
    // The kernel reaps the children of a process that ignores SIGCHLD, orphans it inherits included.
    crate::sys::ignore_child_signals();
    loop {
        std::thread::park();
    }
}
