//! The jail of the VMM: what the process gives up before the guest's first instruction, in layers of which each is to hold alone.
//!
//! | layer | what is left |
//! |---|---|
//! | namespaces | its own, with nothing in them; the PID namespace is the daemon's to make |
//! | root | an empty read-only tmpfs |
//! | user | one that no other sandbox has, without capabilities, for good |
//! | limits | see [`enter`] |
//! | Landlock | no path, no TCP, no signal to or abstract socket of others; as far as the kernel has it |
//! | seccomp | a list of system calls for each kind of thread ([`seccomp`]) |
//!
//! What it needs it has as open descriptors. `vmm/tests/jail/` tries the layers, `tests/tests/e2e/jail.rs` looks at the result.

pub mod seccomp;

use isopod_jail::{JailError, Landlocked};
use rustix::mount::MountAttrFlags;
use rustix::process::{DumpableBehavior, Resource};
use rustix::thread::CapabilitySet;

/// Whom the process becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Not 0.
    pub uid: u32,
    /// Its only group, not 0.
    pub gid: u32,
}

/// Descriptors: those of all disks' segments, of the guest's connections, and some for each device.
const MAX_DESCRIPTORS: u64 = 32 * 1024;
/// Processes of the user, which are its threads: vCPUs, a worker for each device, and those that KVM starts.
const MAX_THREADS: u64 = 256;

/// Enters the jail for good: while there is one thread, and before anything of the guest's is looked at. Files do not grow over
/// `largest_file` bytes from here on. The filters of system calls come later, a thread at a time ([`seccomp::confine`]).
pub fn enter(user: User, largest_file: u64) -> Result<Landlocked, JailError> {
    isopod_jail::leave_namespaces()?;
    let options = [("mode", "0555"), ("size", "4096"), ("nr_inodes", "1")];
    let root = isopod_jail::new_filesystem("tmpfs", &options, MountAttrFlags::MOUNT_ATTR_RDONLY)
        .map_err(JailError::of("make an empty root"))?;
    isopod_jail::enter_empty_root(&root).map_err(JailError::of("enter an empty root"))?;
    drop(root);

    let limits = [
        (Resource::Nofile, MAX_DESCRIPTORS),
        (Resource::Nproc, MAX_THREADS),
        (Resource::Fsize, largest_file),
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ];
    limits.into_iter().try_for_each(|(resource, value)| isopod_jail::limit(resource, value))?;

    isopod_jail::bound_capabilities(CapabilitySet::empty())?;
    isopod_jail::become_user(user.uid, user.gid)?;
    isopod_jail::keep_capabilities(CapabilitySet::empty())?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(JailError::of("become undumpable"))?;
    // No mount can be changed after it, and it takes no_new_privs.
    let landlocked = isopod_jail::allow_nothing()?;
    seccomp::prepare();
    Ok(landlocked)
}
