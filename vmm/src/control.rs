//! The control socket, and the event loop that serves it until the VM is over.

pub(crate) mod connection;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use isopod_proto::vmm::control_reply::Reply;
use isopod_proto::vmm::control_request::Request;
use isopod_proto::vmm::{
    AddDisk, AddFileSystem, ConsoleContents, ControlError, ControlReply, ControlRequest, Done, RemoveDisk,
    ResizeMemory, VmInfo,
};
use isopod_proto::{DiskId, ErrorKind};
use rustix::event::{PollFd, PollFlags, poll};

use crate::config::DiskConfig;
use crate::exit::{Exit, Reason, chain};
use crate::machine::Machine;
use connection::Connection;

/// Connections served at once; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 16;
/// Descriptors besides the connections that are waited for.
const FIXED: usize = 3;

/// Serves `listener` until the VM ends by itself, is told to stop, or `signals` is readable. Says which.
pub fn serve(machine: &mut Machine, listener: &UnixListener, signals: &OwnedFd) -> io::Result<Exit> {
    listener.set_nonblocking(true)?;
    let mut connections: Vec<Connection> = vec![];
    loop {
        let (fixed, ready) = wait(machine, listener, signals, &connections)?;
        if let Some(exit) = machine.vcpus().exit().filter(|_| fixed[0]) {
            return Ok(exit);
        }
        if fixed[1] {
            return Ok(Exit::new(Reason::Stopped, "stopped by a signal"));
        }
        let mut ready = ready.into_iter();
        let mut stop = false;
        connections.retain_mut(|connection| {
            !ready.next().unwrap_or(false)
                || connection.serve(|request, files| answer(machine, request, files, &mut stop))
        });
        if stop {
            return Ok(Exit::new(Reason::Stopped, "stopped by request"));
        }
        if fixed[2] && connections.len() < MAX_CONNECTIONS {
            // A client that is gone again by now is nobody's loss.
            connections.extend(listener.accept().ok().and_then(|(stream, _)| Connection::new(stream).ok()));
        }
    }
}

/// Waits for something to do: which of the VM's end, the signals and the listener are ready, and which connections.
fn wait(
    machine: &Machine,
    listener: &UnixListener,
    signals: &OwnedFd,
    connections: &[Connection],
) -> io::Result<([bool; FIXED], Vec<bool>)> {
    let accepting = if connections.len() < MAX_CONNECTIONS { PollFlags::IN } else { PollFlags::empty() };
    let mut fds = vec![
        PollFd::new(machine.vcpus().ended(), PollFlags::IN),
        PollFd::new(signals, PollFlags::IN),
        PollFd::new(listener, accepting),
    ];
    fds.extend(
        connections.iter().map(|connection| PollFd::from_borrowed_fd(connection.as_fd(), connection.interest())),
    );
    loop {
        match poll(&mut fds, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    Ok(([ready[0], ready[1], ready[2]], ready[FIXED..].to_vec()))
}

/// A failed request, as the daemon is told.
struct Failure(ErrorKind, String);

/// Does what `request` asks. `files` gives the descriptors that came with it, when the request has some.
fn answer(
    machine: &mut Machine,
    request: ControlRequest,
    files: &mut connection::Descriptors,
    stop: &mut bool,
) -> ControlReply {
    let reply = match request.request {
        None => Err(Failure(ErrorKind::InvalidArgument, "the request is empty or of an unknown kind".into())),
        Some(Request::AddDisk(AddDisk { disk })) => add_disk(machine, disk, files),
        Some(Request::RemoveDisk(RemoveDisk { id })) => remove_disk(machine, &id),
        Some(Request::AddFileSystem(AddFileSystem { tag })) => add_file_system(machine, &tag, files),
        Some(Request::ResizeMemory(ResizeMemory { bytes })) => resize_memory(machine, bytes),
        Some(Request::Info(_)) => Ok(Reply::Info(info(machine))),
        Some(Request::Console(_)) => Ok(Reply::Console(ConsoleContents { bytes: machine.console().contents() })),
        Some(Request::Pause(_)) => match machine.vcpus().pause() {
            Ok(()) => Ok(Reply::Done(Done {})),
            Err(error) => Err(Failure(ErrorKind::DeadlineExceeded, chain(&error))),
        },
        Some(Request::Resume(_)) => {
            machine.vcpus().resume();
            Ok(Reply::Done(Done {}))
        }
        Some(Request::Stop(_)) => {
            *stop = true;
            Ok(Reply::Done(Done {}))
        }
    };
    let reply =
        reply.unwrap_or_else(|Failure(kind, message)| Reply::Error(ControlError { kind: kind.code(), message }));
    ControlReply { reply: Some(reply) }
}

fn add_disk(
    machine: &mut Machine,
    disk: Option<isopod_proto::vmm::Disk>,
    files: &mut connection::Descriptors,
) -> Result<Reply, Failure> {
    let disk = disk.ok_or_else(|| Failure(ErrorKind::InvalidArgument, "AddDisk has no disk".into()))?;
    let highest = disk.segments.iter().map(|segment| i64::from(segment.fd)).max().unwrap_or(-1);
    let files = files.take(usize::try_from(highest + 1).unwrap_or(0));
    let disk = DiskConfig::from_request(disk, &files).map_err(|error| Failure(error.kind(), chain(&error)))?;
    machine.add_disk(disk).map_err(|error| Failure(error.kind(), chain(&error)))?;
    Ok(Reply::Done(Done {}))
}

fn remove_disk(machine: &mut Machine, id: &str) -> Result<Reply, Failure> {
    let id = DiskId::parse(id).map_err(|error| Failure(ErrorKind::InvalidArgument, error.to_string()))?;
    machine.remove_disk(&id).map_err(|error| Failure(error.kind(), chain(&error)))?;
    Ok(Reply::Done(Done {}))
}

fn add_file_system(machine: &mut Machine, tag: &str, files: &mut connection::Descriptors) -> Result<Reply, Failure> {
    let missing = || Failure(ErrorKind::InvalidArgument, "AddFileSystem comes without a socket".into());
    let socket = files.take(1).pop().ok_or_else(missing)?;
    machine.add_file_system(tag, socket.into()).map_err(|error| Failure(error.kind(), chain(&error)))?;
    Ok(Reply::Done(Done {}))
}

fn resize_memory(machine: &Machine, bytes: u64) -> Result<Reply, Failure> {
    machine.resize_memory(bytes).map_err(|error| Failure(error.kind(), chain(&error)))?;
    Ok(Reply::Done(Done {}))
}

fn info(machine: &Machine) -> VmInfo {
    let (size, largest) = (machine.size(), machine.largest_size());
    VmInfo {
        paused: machine.vcpus().is_paused(),
        vcpus: size.vcpus.into(),
        memory_bytes: size.memory_bytes,
        max_vcpus: largest.vcpus.into(),
        max_memory_bytes: largest.memory_bytes,
        min_memory_bytes: machine.made().memory_bytes,
        disk_ids: machine.disk_ids().map(ToString::to_string).collect(),
        userspace_exits: machine.vcpus().userspace_exits(),
    }
}
