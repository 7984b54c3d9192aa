//! User namespaces from the stub's side.

use std::os::fd::BorrowedFd;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Gid, Uid};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::channel::Channel;
use super::message::Event;
use super::report;
use crate::error::{Context as _, Result};

/// Makes a user namespace and is in it until the agent closes the socket.
pub fn hold(channel: &mut Channel) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER).context(|| "make a user namespace")?;
    report(channel, Event::Ready(false), &[])?;
    super::wait_for_go(channel).map(drop)
}

/// Enters a user namespace as its root, with all capabilities there and none outside.
pub fn enter(namespace: BorrowedFd<'_>) -> Result<()> {
    move_into_thread_name_spaces(namespace, ThreadNameSpaceType::USER).context(|| "enter the user namespace")?;
    rustix::thread::set_thread_groups(&[]).context(|| "leave the groups of the guest")?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).context(|| "become its group 0")?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).context(|| "become its user 0")
}
