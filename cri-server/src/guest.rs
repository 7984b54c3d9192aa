//! The way into a guest: the agent's gRPC service and its streams, over the VMM's vsock socket.
//!
//! A connection begins with the line protocol of `proto/vmm.proto`; what follows is gRPC, a [`Hello`], or a stream as in
//! `proto/stream.proto`. The guest is hostile: what it sends is bounded, and every call has a deadline.

mod stream;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use isopod_proto::agent::Hello;
use isopod_proto::agent::agent_client::AgentClient;
use isopod_proto::{
    AGENT_PROTOCOL_VERSION, AGENT_RPC_PORT, ErrorKind, FrameError, HELLO_PORT, MAX_AGENT_MESSAGE, MAX_HELLO,
    decode_frame,
};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::vmm::{Vm, threads};

pub use stream::{Input, Output};

/// For calls that answer at once.
pub const SHORT: Duration = Duration::from_secs(20);
/// For calls that mount or start something.
pub const LONG: Duration = Duration::from_secs(100);
/// How long the reason of a lost connection is waited for.
const END_GRACE: Duration = Duration::from_secs(2);
/// Longest line of the vsock socket's handshake.
const MAX_LINE: usize = 64;

/// A running guest. Clones are the same one.
#[derive(Clone)]
pub struct Guest {
    socket: PathBuf,
    client: AgentClient<Channel>,
}

/// The guest did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It did not answer in time.
    #[error("the guest did not answer {call} within {} s", deadline.as_secs())]
    Deadline {
        /// What was asked.
        call: &'static str,
        /// How long it had.
        deadline: Duration,
    },
    /// It answered with an error.
    #[error("{call} in the guest: {message}")]
    Refused {
        /// What was asked.
        call: &'static str,
        /// The agent's kind of error.
        kind: ErrorKind,
        /// The agent's words.
        message: String,
    },
    /// It is not waited for any longer.
    #[error("{call} in the guest was given up, as the sandbox is to be stopped")]
    GivenUp {
        /// What was asked.
        call: &'static str,
    },
    /// Its VM ended meanwhile.
    #[error("{call} in the guest: the VM ended: {message}{}", crate::vmm::shown(console))]
    VmEnded {
        /// What was asked.
        call: &'static str,
        /// Why it ended.
        message: String,
        /// The end of the console's output.
        console: String,
    },
    /// The connection failed.
    #[error("cannot {doing} the guest through {socket}")]
    Connection {
        /// What was tried.
        doing: &'static str,
        /// The VMM's socket.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM's socket answered something else than `OK`.
    #[error("the VMM answered {line:?} to a connection to the guest")]
    Handshake {
        /// What it said.
        line: String,
    },
    /// The guest sent bytes that are not the message that was due.
    #[error("the guest sent a malformed {message}")]
    Malformed {
        /// What it should have been.
        message: &'static str,
        /// What is wrong with it.
        #[source]
        source: FrameError,
    },
    /// The guest answered with something that cannot be.
    #[error("{call} in the guest gave {what}")]
    Impossible {
        /// What was asked.
        call: &'static str,
        /// What it said.
        what: String,
    },
    /// The agent is of another version.
    #[error("the agent speaks version {found} of the agent protocol, the daemon {AGENT_PROTOCOL_VERSION}")]
    Version {
        /// The agent's.
        found: u32,
    },
}

impl GuestError {
    /// This error of `call`, or the end of `vm` if that is what it comes of. What a VM does whose guest does not answer is logged.
    pub async fn or_end_of(self, vm: &Vm, call: &'static str) -> Self {
        match &self {
            // What the agent says is late is an answer.
            Self::Deadline { .. } => {}
            error if error.kind() == ErrorKind::Unavailable => {
                if let Ok(end) = timeout(END_GRACE, vm.ended()).await {
                    return Self::VmEnded { call, message: end.message.clone(), console: end.console.clone() };
                }
            }
            _ => return self,
        }
        let threads = threads(vm.identity().pid);
        tracing::warn!(call, threads, "a guest whose VM runs does not answer");
        self
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Refused { kind, .. } => *kind,
            Self::GivenUp { .. } | Self::VmEnded { .. } | Self::Connection { .. } | Self::Handshake { .. } => {
                ErrorKind::Unavailable
            }
            Self::Malformed { .. } | Self::Impossible { .. } => ErrorKind::Corrupt,
            Self::Version { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

/// A connection on which the guest's hello is to come.
pub struct HelloConnection {
    socket: PathBuf,
    stream: UnixStream,
}

impl HelloConnection {
    /// Asks for the guest's connection to the hello port. The VMM need not run yet: its socket must listen.
    pub async fn open(socket: &Path) -> Result<Self, GuestError> {
        let failed = |source| GuestError::Connection { doing: "await", socket: socket.into(), source };
        let mut stream = UnixStream::connect(socket).await.map_err(failed)?;
        stream.write_all(format!("ACCEPT {HELLO_PORT}\n").as_bytes()).await.map_err(failed)?;
        Ok(Self { socket: socket.into(), stream })
    }

    /// Waits for the hello. The caller sets the deadline.
    pub async fn receive(mut self) -> Result<Hello, GuestError> {
        handshake_answer(&mut self.stream, &self.socket).await?;
        let hello: Hello = read_frame(&mut self.stream, &self.socket, MAX_HELLO, "Hello").await?;
        if hello.protocol_version != AGENT_PROTOCOL_VERSION {
            return Err(GuestError::Version { found: hello.protocol_version });
        }
        Ok(hello)
    }
}

/// Connects to a port of the guest.
pub async fn connect(socket: &Path, port: u32) -> Result<UnixStream, GuestError> {
    let failed = |source| GuestError::Connection { doing: "connect to", socket: socket.into(), source };
    let attempt = async {
        let mut stream = UnixStream::connect(socket).await.map_err(failed)?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(failed)?;
        handshake_answer(&mut stream, socket).await?;
        Ok(stream)
    };
    let late = |_| GuestError::Deadline { call: "a connection", deadline: SHORT };
    timeout(SHORT, attempt).await.map_err(late)?
}

async fn handshake_answer(stream: &mut UnixStream, socket: &Path) -> Result<(), GuestError> {
    let mut line = Vec::with_capacity(MAX_LINE);
    loop {
        let byte = stream.read_u8().await.map_err(|source| GuestError::Connection {
            doing: "connect to",
            socket: socket.into(),
            source,
        })?;
        if byte == b'\n' {
            break;
        }
        line.push(byte);
        if line.len() == MAX_LINE {
            break;
        }
    }
    if line.starts_with(b"OK ") {
        return Ok(());
    }
    Err(GuestError::Handshake { line: String::from_utf8_lossy(&line).into_owned() })
}

/// Reads one length-prefixed message and not a byte more.
async fn read_frame<M: Message + Default>(
    stream: &mut UnixStream,
    socket: &Path,
    limit: usize,
    message: &'static str,
) -> Result<M, GuestError> {
    let failed = |source| GuestError::Connection { doing: "read from", socket: socket.into(), source };
    let malformed = |source| GuestError::Malformed { message, source };
    let mut frame = vec![0; 4];
    stream.read_exact(&mut frame).await.map_err(failed)?;
    let length = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
    if length > limit {
        return Err(malformed(FrameError::TooLong { length, limit }));
    }
    frame.resize(4 + length, 0);
    stream.read_exact(&mut frame[4..]).await.map_err(failed)?;
    let (decoded, _) = decode_frame(&frame, limit).map_err(malformed)?.expect("the frame was read whole");
    Ok(decoded)
}

impl Guest {
    /// The guest behind the VMM's vsock socket. Connections are made when they are needed.
    pub fn new(socket: PathBuf) -> Self {
        let path = socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { connect(&path, AGENT_RPC_PORT).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://agent").connect_with_connector_lazy(connector);
        let client = AgentClient::new(channel)
            .max_decoding_message_size(MAX_AGENT_MESSAGE)
            .max_encoding_message_size(MAX_AGENT_MESSAGE);
        Self { socket, client }
    }

    /// The agent's client, for [`Guest::call`].
    pub fn client(&self) -> AgentClient<Channel> {
        self.client.clone()
    }

    /// Awaits the answer to a call of the agent, at most `deadline`.
    pub async fn call<T>(
        call: &'static str,
        deadline: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, GuestError> {
        match timeout(deadline, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(refused(call, &status)),
            Err(_) => Err(GuestError::Deadline { call, deadline }),
        }
    }
}

fn refused(call: &'static str, status: &Status) -> GuestError {
    let kind = match status.code() {
        // A connection that breaks in the middle of a call is Unknown or Cancelled to tonic.
        Code::Unknown | Code::Cancelled => ErrorKind::Unavailable,
        code => ErrorKind::from_code(code as u32),
    };
    GuestError::Refused { call, kind, message: status.message().chars().take(1000).collect() }
}

#[cfg(test)]
mod tests {
    use isopod_proto::encode_frame;
    use tokio::net::UnixListener;

    use super::*;

    /// A VMM's vsock socket that says `answer` to whatever connects, and then nothing more.
    fn fake_vmm(answer: Vec<u8>) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&socket).expect("bound");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let answer = answer.clone();
                tokio::spawn(async move {
                    let mut line = [0; 64];
                    let _ = stream.read(&mut line).await; // Whatever it is.
                    let _ = stream.write_all(&answer).await; // The peer may have gone.
                    std::future::pending::<()>().await;
                });
            }
        });
        (directory, socket)
    }

    #[tokio::test]
    async fn a_hello_is_received() {
        let hello = Hello { protocol_version: AGENT_PROTOCOL_VERSION, agent_version: "x".into(), ..Hello::default() };
        let (_directory, socket) = fake_vmm([b"OK 1\n".to_vec(), encode_frame(&hello)].concat());
        let connection = HelloConnection::open(&socket).await.expect("it listens");
        assert_eq!(connection.receive().await.expect("a hello"), hello);
    }

    #[tokio::test]
    async fn an_agent_of_another_version_is_refused() {
        let hello = Hello { protocol_version: 99, ..Hello::default() };
        let (_directory, socket) = fake_vmm([b"OK 1\n".to_vec(), encode_frame(&hello)].concat());
        let error = HelloConnection::open(&socket).await.expect("it listens").receive().await.expect_err("99");
        assert!(matches!(error, GuestError::Version { found: 99 }));
    }

    #[tokio::test]
    async fn a_hello_longer_than_allowed_is_refused_unread() {
        let (_directory, socket) = fake_vmm([b"OK 1\n".to_vec(), u32::MAX.to_le_bytes().to_vec()].concat());
        let error = HelloConnection::open(&socket).await.expect("it listens").receive().await.expect_err("too long");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_refused() {
        let (_directory, socket) = fake_vmm(vec![b'x'; 1000]);
        assert!(matches!(connect(&socket, 1).await, Err(GuestError::Handshake { .. })));
    }

    #[tokio::test]
    async fn a_connection_lost_with_the_vm_is_told_by_the_vms_end() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("vmm.log"), "out of descriptors\n").expect("written");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        let vm = Vm::of_process(child.id() as i32, directory.path());
        let lost = || GuestError::Handshake { line: String::new() };
        let refused = GuestError::Deadline { call: "X", deadline: SHORT };
        assert!(matches!(refused.or_end_of(&vm, "X").await, GuestError::Deadline { .. }));
        child.kill().expect("killed");
        child.wait().expect("reaped");
        let error = lost().or_end_of(&vm, "CreateContainer").await.to_string();
        assert!(error.starts_with("CreateContainer") && error.contains("out of descriptors"), "{error}");
    }

    #[tokio::test]
    async fn an_agent_that_never_answers_meets_the_deadline() {
        let (_directory, socket) = fake_vmm(b"OK 1\n".to_vec());
        let guest = Guest::new(socket);
        let mut client = guest.client();
        let answer = client.stats(isopod_proto::agent::StatsRequest::default());
        let error = Guest::call("Stats", Duration::from_millis(100), answer).await.expect_err("no answer");
        assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
    }
}
