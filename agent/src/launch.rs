//! Starting stubs and following their reports, from the agent's side.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ErrorKind;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::Signal;

use crate::error::{Context as _, Error, Result};
use crate::reaper::{Reaper, Watched};
use crate::stub::STUB_ARGUMENT;
use crate::stub::channel::Channel;
use crate::stub::message::{Descriptor, Event, Launch, Report};

/// How long a stub may take from one report to the next. A guest may be slow, but mounts and namespaces are quick.
const STUB_TIMEOUT: Duration = Duration::from_secs(60);

/// A process that is prepared and waits for its go. Dropping it ends the process.
pub struct Prepared {
    channel: Channel,
    /// Its id in the agent's PID namespace.
    pub pid: i32,
    /// How to follow and signal it.
    pub watched: Watched,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Starts a stub that becomes what `launch` says, and waits until it is prepared. Blocks.
pub fn prepare(reaper: &Arc<Reaper>, launch: &mut Launch, descriptors: &[(Descriptor, &OwnedFd)]) -> Result<Prepared> {
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .context(|| "make a socket to a stub")?;
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&ours, timeout, Some(STUB_TIMEOUT)).context(|| "set the timeout of a stub's socket")?;
    }
    let guard = reaper.begin_launch();
    let mut command = Command::new("/proc/self/exe");
    command.arg(STUB_ARGUMENT).env_clear().stdin(theirs).stdout(Stdio::null());
    reaper.spawn(&mut command).context(|| "start a stub of the agent")?;
    // The command holds our copy of the stub's end; without this its end would never be seen to close.
    drop(command);

    launch.descriptors = descriptors.iter().map(|(what, _)| *what as i32).collect();
    let borrowed: Vec<_> = descriptors.iter().map(|(_, descriptor)| descriptor.as_fd()).collect();
    let mut channel = Channel::new(ours);
    channel.send(launch, &borrowed).context(|| "send a stub what to launch")?;

    let (mut forked, mut ready) = (None, None);
    // Two processes report, so the order is not given.
    while forked.is_none() || ready.is_none() {
        match next_event(&mut channel) {
            Ok((Event::Forked(pid), _)) => forked = Some((pid, reaper.watch(pid).context(|| "watch a new process")?)),
            Ok((Event::Ready(_), descriptors)) => ready = Some(descriptors),
            result => {
                kill(forked.as_ref().and_then(|(_, watched): &(i32, Watched)| watched.pidfd.as_ref()));
                let out_of_order = || Error::new(ErrorKind::Internal, "a stub did not wait for its go");
                return Err(result.err().unwrap_or_else(out_of_order));
            }
        }
    }
    drop(guard);
    let (Some((pid, watched)), Some(descriptors)) = (forked, ready) else {
        return Err(Error::new(ErrorKind::Internal, "a stub is not ready"));
    };
    Ok(Prepared { channel, pid, watched, terminal: descriptors.into_iter().next() })
}

impl Prepared {
    /// Lets the process run its program. Blocks until the program runs or it is known why it cannot.
    pub fn go(&mut self) -> Result<()> {
        self.channel.send(&Report { event: None }, &[]).context(|| "tell a stub to go on")?;
        loop {
            match self.channel.receive::<Report>().context(|| "wait for a stub to run its program")? {
                Some((Report { event: Some(Event::Executing(_)) }, _)) => break,
                Some((Report { event: Some(Event::Failed(failure)) }, _)) => {
                    return Err(Error::new(ErrorKind::from_code(failure.kind), failure.message));
                }
                Some(_) => {}
                None => {
                    return Err(Error::new(ErrorKind::Internal, "the process was killed before it ran its program"));
                }
            }
        }
        match self.channel.receive::<Report>().context(|| "wait for a stub to run its program")? {
            None => Ok(()),
            Some((Report { event: Some(Event::Failed(failure)) }, _)) => {
                Err(Error::new(ErrorKind::from_code(failure.kind), failure.message))
            }
            Some(_) => Err(Error::new(ErrorKind::Internal, "a stub reports out of order")),
        }
    }
}

fn next_event(channel: &mut Channel) -> Result<(Event, Vec<OwnedFd>)> {
    match channel.receive::<Report>().context(|| "wait for a stub to prepare a process")? {
        Some((Report { event: Some(Event::Failed(failure)) }, _)) => {
            Err(Error::new(ErrorKind::from_code(failure.kind), failure.message))
        }
        Some((Report { event: Some(event) }, descriptors)) => Ok((event, descriptors)),
        Some((Report { event: None }, _)) => Err(Error::new(ErrorKind::Internal, "a stub reports nothing")),
        None => Err(Error::new(ErrorKind::Internal, "the process was killed while it was prepared")),
    }
}

/// Kills the process of a pidfd; that it has already ended is as good.
pub fn kill(pidfd: Option<&OwnedFd>) {
    if let Some(pidfd) = pidfd {
        let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    }
}

/// /dev/null for reading.
pub fn null() -> Result<OwnedFd> {
    Ok(File::open("/dev/null").context(|| "open /dev/null")?.into())
}
