//! The server process: makes its jail, then serves.
//!
//! It starts as a child of the broker, in the namespaces that the broker has made, as process 1 of a PID namespace, with the
//! host's mounts still in sight. What it does here, in this order, ends that.
//!
//! | layer | what is left | beside the VMM's (`vmm/src/jail.rs`) |
//! |---|---|---|
//! | namespaces | its own; the mount namespace is the broker's too | the same, but for the broker |
//! | root | a tmpfs with the shares in it; nothing is executed, no device node and no set-user-ID bit counts there | it is empty |
//! | user | root without other groups, with [`CAPABILITIES`], for good | a user of the pod's own, without capabilities |
//! | limits | see [`limit`] | fewer descriptors and threads, and files of a size |
//! | Landlock | files below the root, as [`isopod_jail::allow_below`] says; no TCP, no signal to or abstract socket of others | no file |
//! | seccomp | calls on open files and on names below them ([`seccomp`]) | other ones |
//!
//! It has no user of its own, as the files that it serves and makes belong to anybody: what a container's process may do with them
//! the guest's kernel decides, and the host's must let it. Nor a user namespace: in one, the five capabilities would reach the very
//! same files. `tests/tests/e2e/file_server_jail.rs` looks at the result.

pub(crate) mod seccomp;

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use isopod_jail::new_filesystem;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountAttrFlags, MountPropagationFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::CapabilitySet;

use crate::server::Server;
use crate::session;
use seccomp::Filters;

/// What root needs to do with files as it likes. Not CAP_DAC_READ_SEARCH, which opens files by handle, wherever they are, and
/// not CAP_MKNOD.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP);
/// Descriptors the server may have: one for each file that the guest knows.
const MAX_DESCRIPTORS: u64 = 1 << 20;

fn failed(what: &'static str) -> impl Fn(rustix::io::Errno) -> io::Error {
    move |errno| io::Error::other(format!("cannot {what}: {errno}"))
}

/// Serves the guest's requests from `fuse`, and the broker's, to let go of shares, from `control`. Returns at the end of the VM.
pub fn serve(fuse: UnixStream, control: UnixStream) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("follow the broker's end"))?;
    limit()?;
    // Modes come from the guest, less its umask.
    rustix::process::umask(Mode::empty());
    let descriptors = own_descriptors().map_err(failed("open /proc/self/fd"))?;
    enter_empty_root().map_err(failed("enter an empty root"))?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open the root"))?;
    drop_privileges()?;
    // No mount can be changed after it by this process; the broker goes on with that. It takes no_new_privs.
    let landlocked = isopod_jail::allow_below(root.as_fd()).map_err(jail_failed)?;
    eprintln!("isopod-fs: in its jail, with {landlocked}");
    let filters = Filters::compile();
    filters.confine_first()?;

    let server = Server::new(root, descriptors);
    // Tells the broker that the root is there.
    (&control).write_all(b"\n")?;
    let confine = || filters.confine_worker();
    std::thread::scope(|scope| {
        let work = || {
            confine();
            let_go(&server, &control)
        };
        let letting_go = std::thread::Builder::new().name("shares".to_owned()).spawn_scoped(scope, work)?;
        let result = session::run(&server, &fuse, &confine);
        // Ends the other thread.
        let _ = control.shutdown(std::net::Shutdown::Both);
        letting_go.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))?;
        result
    })
}

/// Lets go of shares that the broker has taken away: a line has the beginning of their names, and gets an empty one in answer.
fn let_go(server: &Server, mut control: &UnixStream) -> io::Result<()> {
    let mut lines = BufReader::new(control);
    let mut prefix = String::new();
    while lines.read_line(&mut prefix)? > 0 {
        let gone = prefix.trim_end_matches('\n');
        server.forget_shares(|share| share.starts_with(gone));
        control.write_all(b"\n")?;
        prefix.clear();
    }
    Ok(())
}

/// Descriptors as many as the guest may know files, no core, no locked memory and no message queue. Not the size of files, which are the
/// host's and as large as they are.
fn limit() -> io::Result<()> {
    let none = [Resource::Core, Resource::Memlock, Resource::Msgqueue];
    none.into_iter().try_for_each(|resource| isopod_jail::limit(resource, 0)).map_err(jail_failed)?;
    let limit = Rlimit { current: Some(MAX_DESCRIPTORS), maximum: Some(MAX_DESCRIPTORS) };
    if rustix::process::setrlimit(Resource::Nofile, limit).is_err() {
        // More than fs.nr_open of the host: then what is allowed without asking. A guest that needs more is told ENFILE.
        let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
        let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
    Ok(())
}

/// The directory of this process's own descriptors, in a proc file system that shows no process outside and is mounted nowhere.
fn own_descriptors() -> rustix::io::Result<OwnedFd> {
    let proc = new_filesystem("proc", &[], MountAttrFlags::empty())?;
    rustix::fs::openat(&proc, "self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Makes an empty file system the root of the mount namespace and detaches everything else. The broker, which is in the same
/// namespace, gets the new root with it.
fn enter_empty_root() -> rustix::io::Result<()> {
    // Room for mount points only.
    let root = new_filesystem("tmpfs", &[("mode", "0755"), ("size", "1048576")], MountAttrFlags::empty())?;
    isopod_jail::enter_empty_root(&root)
}

/// Leaves the groups, and the capabilities but those that are needed, for good, and nothing of its memory to a core file or a debugger.
fn drop_privileges() -> io::Result<()> {
    isopod_jail::bound_capabilities(CAPABILITIES).map_err(jail_failed)?;
    isopod_jail::become_user(0, 0).map_err(jail_failed)?;
    isopod_jail::keep_capabilities(CAPABILITIES).map_err(jail_failed)?;
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Leaves the broker, which never sees a byte of the guest's, the one capability that attaching and detaching shares takes.
pub(crate) fn confine_broker() -> io::Result<()> {
    isopod_jail::bound_capabilities(CapabilitySet::SYS_ADMIN).map_err(jail_failed)?;
    isopod_jail::become_user(0, 0).map_err(jail_failed)?;
    isopod_jail::keep_capabilities(CapabilitySet::SYS_ADMIN).map_err(jail_failed)?;
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

fn jail_failed(error: isopod_jail::JailError) -> io::Error {
    io::Error::other(format!("{error}: {}", error.source))
}

/// Stops mounts from spreading between this mount namespace and the one it is a copy of. Shares that are to follow the host
/// do so by themselves.
pub(crate) fn separate_mounts() -> rustix::io::Result<()> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
}
