//! The broker process: starts the server, and gives it shares as the daemon asks.

mod connection;
mod shares;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::CommandFdExt;
use isopod_proto::files::file_server_reply::Reply;
use isopod_proto::files::file_server_request::Request;
use isopod_proto::files::{Done, FileServerError, FileServerReply};
use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::jail;
use shares::Shares;

/// How long the server may take to make its jail, or to let go of shares.
const SERVER_DEADLINE: Duration = Duration::from_secs(20);

/// Runs the broker: waits for a line on `go`, starts the server on `fuse`, says so with a line on `ready`, and takes requests
/// from `control` until the server ends, which it does with the VM. Returns how the server ended.
pub fn run(mut go: impl Read, mut ready: impl Write, control: &UnixListener, fuse: UnixStream) -> io::Result<()> {
    // The daemon moves this process to the pod's cgroup first. If it ends instead, so does this.
    go.read_exact(&mut [0])?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces).map_err(|error| io::Error::other(format!("cannot make namespaces: {error}")))?;
    jail::separate_mounts()?;
    let (server, link) = start_server(fuse)?;
    jail::confine_broker()?;
    ready.write_all(b"\n")?;
    drop(ready);
    let shares = Shares::new(link)?;
    serve(control, server, &shares)
}

/// Starts this very program again as the server, and waits until its jail is made. `fuse` is the server's alone: its end is
/// how both sides learn of each other's.
fn start_server(fuse: UnixStream) -> io::Result<(Child, UnixStream)> {
    let (link, theirs) = UnixStream::pair()?;
    let (fuse, theirs) = (OwnedFd::from(fuse), OwnedFd::from(theirs));
    let mut command = Command::new("/proc/self/exe");
    command.args(["serve", &fuse.as_raw_fd().to_string(), &theirs.as_raw_fd().to_string()]);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).preserved_fds(vec![fuse, theirs]);
    let server = command.spawn()?;
    // The command holds our copies of the descriptors.
    drop(command);
    link.set_read_timeout(Some(SERVER_DEADLINE))?;
    (&link).read_exact(&mut [0]).map_err(|error| io::Error::other(format!("the server does not start: {error}")))?;
    Ok((server, link))
}

/// Takes connections until the server has ended.
fn serve(control: &UnixListener, mut server: Child, shares: &Shares) -> io::Result<()> {
    let pid = i32::try_from(server.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    control.set_nonblocking(true)?;
    loop {
        let mut fds = [PollFd::new(&ended, PollFlags::IN), PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            let status = server.wait()?;
            return if status.success() { Ok(()) } else { Err(io::Error::other(format!("the server: {status}"))) };
        }
        if let Ok((stream, _)) = control.accept() {
            // A daemon that does not keep to the protocol, or goes away, has nothing to be told.
            let _ = connection::serve(stream, |request, tree| answer(shares, request, tree));
        }
    }
}

fn answer(shares: &Shares, request: Option<Request>, tree: Option<OwnedFd>) -> FileServerReply {
    let result = match (request, tree) {
        (Some(Request::AddShare(share)), Some(tree)) => shares.add(&share, &tree),
        (Some(Request::AddShare(_)), None) => Err(shares::ShareError::NoTree),
        (Some(Request::RemoveShares(gone)), _) => shares.remove(&gone.prefix),
        (None, _) => Err(shares::ShareError::Unknown),
    };
    let reply = match result {
        Ok(()) => Reply::Done(Done {}),
        Err(error) => Reply::Error(FileServerError { kind: error.kind().code(), message: described(&error) }),
    };
    FileServerReply { reply: Some(reply) }
}

fn described(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", described(source)),
        None => error.to_string(),
    }
}
