//! A pod's file server: starting it, finding it again, telling it what to share.
//!
//! One `isopod-fs` a pod that shares something, in the pod's cgroup. It ends with the VM, whose device holds the other end of
//! its socket. In the VM's directory are its control socket (`fs.sock`, `proto/file_server.proto`) and its log (`fs.log`).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use command_fds::CommandFdExt;
use isopod_proto::ErrorKind;
use isopod_proto::files::file_server_reply::Reply;
use isopod_proto::files::file_server_request::Request;
use isopod_proto::files::{AddShare, FileServerReply, FileServerRequest, RemoveShares};
use serde::{Deserialize, Serialize};

use super::host::Tree;
use super::plan::{Access, HostSource};
use crate::cgroup::{self, CgroupError};
use crate::vmm::{VmIdentity, exchange, start_time};

/// Name of the control socket in the VM's directory.
const SOCKET: &str = "fs.sock";
/// How long the server may take to make its jail.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long it may take to share something or to let go of it.
const DEADLINE: Duration = Duration::from_secs(30);

/// What is stored of a pod's file server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileServerRecord {
    /// The process.
    pub process: VmIdentity,
    /// The guest has it mounted.
    pub mounted: bool,
}

/// A file server that cannot be started or used.
#[derive(Debug, thiserror::Error)]
pub enum FileServerError {
    /// It does not start.
    #[error("cannot start the file server {binary}")]
    Start {
        /// Its program.
        binary: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its cgroup.
    #[error("cannot put the file server into its pod's cgroup")]
    Cgroup(#[source] CgroupError),
    /// It cannot be asked.
    #[error("cannot ask the file server at {socket}")]
    Control {
        /// Its socket.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It refuses.
    #[error("the file server: {message}")]
    Refused {
        /// Its kind of error.
        kind: ErrorKind,
        /// Its words.
        message: String,
    },
}

impl FileServerError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Start { .. } => ErrorKind::Internal,
            Self::Cgroup(error) => error.kind(),
            Self::Control { .. } => ErrorKind::Unavailable,
            Self::Refused { kind, .. } => *kind,
        }
    }
}

/// A file server that has been started and waits to be told to go on. Dropped before, it is killed.
#[derive(Debug)]
pub struct Starting {
    child: KillOnDrop,
    identity: VmIdentity,
    binary: PathBuf,
    go: ChildStdin,
    /// The guest's end of the connection.
    fuse: OwnedFd,
}

impl Starting {
    /// Starts the program `binary` for the VM in `directory`, in `cgroup`. Blocks.
    pub fn new(binary: &Path, directory: &Path, cgroup: &Path) -> Result<Self, FileServerError> {
        let failed = |source: io::Error| FileServerError::Start { binary: binary.into(), source };
        let (mut child, fuse) = spawn(binary, directory).map_err(failed)?;
        let go = child.stdin.take();
        let pid = child.id() as i32;
        let child = KillOnDrop(Some(child));
        cgroup::enter(cgroup, pid).map_err(FileServerError::Cgroup)?;
        let identity = VmIdentity { pid, start_time: start_time(pid).map_err(failed)? };
        let go = go.ok_or_else(|| failed(io::Error::other("it has no standard input")))?;
        Ok(Self { child, identity, binary: binary.into(), go, fuse })
    }

    /// How to find it again.
    pub fn identity(&self) -> VmIdentity {
        self.identity
    }

    /// Lets it make its jail and waits until it has; to be called once its identity is durable. Returns the guest's end of the
    /// connection to it. From here on it is reaped when it ends. Blocks.
    pub fn go(mut self) -> Result<OwnedFd, FileServerError> {
        let failed = |source: io::Error| FileServerError::Start { binary: self.binary.clone(), source };
        let ready = self.child.0.as_mut().and_then(|child| child.stdout.take());
        let ready = ready.ok_or_else(|| failed(io::Error::other("it has no standard output")))?;
        self.go.write_all(b"\n").map_err(failed)?;
        wait_for_byte(OwnedFd::from(ready)).map_err(failed)?;
        let child = self.child.0.take();
        // A thread for each rather than a task, as this one waits; it ends with the process, which ends with the VM.
        let reaper = std::thread::Builder::new().name("fs reaper".to_owned());
        let spawned = reaper.spawn(move || child.map(|mut child| child.wait()));
        spawned.map(drop).map_err(failed)?;
        Ok(self.fuse)
    }
}

/// A process that is killed and reaped unless it is taken out.
#[derive(Debug)]
struct KillOnDrop(Option<Child>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It fails only if the process has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn(binary: &Path, directory: &Path) -> io::Result<(Child, OwnedFd)> {
    let socket = directory.join(SOCKET);
    // One that failed may have left it.
    let _ = std::fs::remove_file(&socket);
    let listener = OwnedFd::from(UnixListener::bind(&socket)?);
    let (fuse, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    let log = File::create(directory.join("fs.log"))?;
    let mut command = Command::new(binary);
    command
        .args(["broker", &listener.as_raw_fd().to_string(), &theirs.as_raw_fd().to_string()])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .process_group(0)
        .preserved_fds(vec![listener, theirs]);
    // The command holds our copies of the descriptors, and goes with this function.
    Ok((command.spawn()?, fuse.into()))
}

fn wait_for_byte(pipe: OwnedFd) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec { tv_sec: START_DEADLINE.as_secs() as i64, tv_nsec: 0 };
    if poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&timeout))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match rustix::io::read(&pipe, &mut [0; 1])? {
        0 => Err(io::Error::other("it ended; see fs.log in the VM's directory")),
        _ => Ok(()),
    }
}

/// Lets the server of the VM in `directory` show `tree` as `name`. Blocks.
pub fn add_share(directory: &Path, name: String, source: &HostSource, tree: Tree) -> Result<(), FileServerError> {
    let share = AddShare {
        name,
        readonly: source.access != Access::Writable,
        recursive_readonly: source.access == Access::RecursiveReadonly,
        follow_host: source.follow_host,
    };
    ask(directory, Request::AddShare(share), vec![tree.mounts.into()])
}

/// Makes the server of the VM in `directory` let go of all shares whose names begin with `prefix`. Blocks.
pub fn remove_shares(directory: &Path, prefix: String) -> Result<(), FileServerError> {
    ask(directory, Request::RemoveShares(RemoveShares { prefix }), vec![])
}

fn ask(directory: &Path, request: Request, files: Vec<File>) -> Result<(), FileServerError> {
    let socket = directory.join(SOCKET);
    let request = FileServerRequest { request: Some(request) };
    let reply: FileServerReply = exchange(&socket, &request, &files, DEADLINE)
        .map_err(|source| FileServerError::Control { socket: socket.clone(), source })?;
    match reply.reply {
        Some(Reply::Done(_)) => Ok(()),
        Some(Reply::Error(error)) => {
            let message = error.message.chars().take(1000).collect();
            Err(FileServerError::Refused { kind: ErrorKind::from_code(error.kind), message })
        }
        None => Err(FileServerError::Control { socket, source: io::Error::other("the reply is empty") }),
    }
}
