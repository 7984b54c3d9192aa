//! User, capabilities, limits.

use rustix::io::Errno;
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::JailError;

/// Capabilities that any kernel may know.
const CAPABILITY_BITS: u64 = 64;

/// Takes all but `kept` out of the bounding set: no program that is executed gets them back.
pub fn bound_capabilities(kept: CapabilitySet) -> Result<(), JailError> {
    for bit in 0..CAPABILITY_BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel knows no more.
            Err(Errno::INVAL) => break,
            result => result.map_err(JailError::of("drop a capability"))?,
        }
    }
    Ok(())
}

/// Keeps `kept` of the capabilities, which executing a program does not bring back: it sets no_new_privs as well. To be called after
/// [`bound_capabilities`] and [`become_user`], which take privileges.
pub fn keep_capabilities(kept: CapabilitySet) -> Result<(), JailError> {
    rustix::thread::clear_ambient_capability_set().map_err(JailError::of("drop the ambient capabilities"))?;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(JailError::of("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(JailError::of("set no_new_privs"))
}

/// Becomes the user `uid` with the only group `gid`, for good. To be called before the capabilities go.
pub fn become_user(uid: u32, gid: u32) -> Result<(), JailError> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[]).map_err(JailError::of("leave the groups"))?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(JailError::of("change the group"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(JailError::of("change the user"))
}

/// Sets both the soft and the hard limit of `resource`. Where the process may not raise the hard limit so far, it stays what it is.
pub fn limit(resource: Resource, value: u64) -> Result<(), JailError> {
    let set = |value| rustix::process::setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) });
    match set(value) {
        Err(Errno::PERM) => match rustix::process::getrlimit(resource).maximum {
            Some(maximum) if maximum < value => set(maximum),
            _ => Err(Errno::PERM),
        },
        result => result,
    }
    .map_err(JailError::of("set a resource limit"))
}
