//! The two listening sockets, and what runs for as long as the agent does.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::agent::agent_server::AgentServer;
use isopod_proto::{AGENT_RPC_PORT, AGENT_STREAM_PORT, MAX_AGENT_MESSAGE};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};
use tonic::transport::Server;
use tonic::transport::server::Connected;

use crate::agent::Agent;
use crate::rpc::Rpc;
use crate::stream;

/// Pause after a failed accept, which is for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the containers may take to end at a shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// A socket that gives connections from the daemon.
pub trait Listener: Send + 'static {
    /// A connection.
    type Connection: AsyncRead + AsyncWrite + AsFd + Connected + Unpin + Send + 'static;
    /// Waits for the next one.
    fn next(&self) -> impl Future<Output = io::Result<Self::Connection>> + Send;
}

impl Listener for VsockListener {
    type Connection = tokio_vsock::VsockStream;

    async fn next(&self) -> io::Result<Self::Connection> {
        loop {
            let (connection, peer) = self.accept().await?;
            // The daemon is on the host. A process in the guest has no business here.
            if peer.cid() == VMADDR_CID_HOST {
                return Ok(connection);
            }
        }
    }
}

impl Listener for UnixListener {
    type Connection = tokio::net::UnixStream;

    async fn next(&self) -> io::Result<Self::Connection> {
        Ok(self.accept().await?.0)
    }
}

/// The sockets for requests and for streams.
pub struct Sockets<L> {
    rpc: L,
    stream: L,
}

impl Sockets<VsockListener> {
    /// The guest's vsock ports.
    pub fn vsock() -> io::Result<Self> {
        let bind = |port| VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port));
        Ok(Self { rpc: bind(AGENT_RPC_PORT)?, stream: bind(AGENT_STREAM_PORT)? })
    }
}

impl Sockets<UnixListener> {
    /// Unix sockets `rpc` and `stream` in `directory`, for an agent that is not in a guest.
    pub fn unix(directory: &Path) -> io::Result<Self> {
        let bind = |name| UnixListener::bind(directory.join(name));
        Ok(Self { rpc: bind("rpc")?, stream: bind("stream")? })
    }
}

/// Serves until the daemon asks for a shutdown and every container has ended.
pub async fn serve<L: Listener>(agent: Arc<Agent>, sockets: Sockets<L>) -> Result<(), tonic::transport::Error> {
    let Sockets { rpc, stream } = sockets;
    let streams = tokio::spawn(serve_streams(Arc::clone(&agent), stream));
    let (sender, connections) = mpsc::channel(1);
    let accept = tokio::spawn(accept_into(rpc, sender));
    let shutdown = Arc::new(Notify::new());
    let service = AgentServer::new(Rpc::new(Arc::clone(&agent), Arc::clone(&shutdown)))
        .max_decoding_message_size(MAX_AGENT_MESSAGE)
        .max_encoding_message_size(MAX_AGENT_MESSAGE);
    let server = Server::builder().add_service(service).serve_with_incoming(ReceiverStream::new(connections));
    let result = tokio::select! {
        result = server => result,
        () = async {
            shutdown.notified().await;
            // Time out or not: the guest goes off.
            let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, agent.kill_all()).await;
        } => Ok(()),
    };
    accept.abort();
    streams.abort();
    result
}

async fn accept_into<L: Listener>(listener: L, connections: mpsc::Sender<io::Result<L::Connection>>) {
    loop {
        match listener.next().await {
            Ok(connection) => {
                if connections.send(Ok(connection)).await.is_err() {
                    return;
                }
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn serve_streams<L: Listener>(agent: Arc<Agent>, listener: L) {
    loop {
        match listener.next().await {
            // Each ends with its connection, its stream or its process.
            Ok(connection) => drop(tokio::spawn(stream::serve(Arc::clone(&agent), connection))),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}
