//! Exec, attach and port-forward: the RPC gives its client a URL of this server, and the client connects to it.
//!
//! ```text
//!  RPC ──requests──▶ token ──http──▶ SPDY or WebSocket ──streams──▶ remote_command ──▶ sandbox::{exec, attach}
//!                                                      └──────────▶ port_forward ──▶ the agent's TCP streams
//! ```
//!
//! The server listens on the loopback interface alone. A token is good once, and for a minute ([`requests`]). Each connection
//! is one task, which ends with its client, and with the daemon.

mod http;
mod port_forward;
pub mod remote_command;
pub mod requests;
pub(crate) mod spdy;
mod status;
pub mod stream;
pub(crate) mod websocket;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::requests::{RequestError, Requests, Session};
use crate::config::StreamingConfig;
use crate::runtime::Runtime;

/// The way to the server. Clones lead to the same one.
#[derive(Clone)]
pub struct Streaming {
    address: SocketAddr,
    requests: Arc<Requests>,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

impl Streaming {
    /// Starts the server.
    pub async fn start(config: &StreamingConfig, runtime: Runtime) -> io::Result<Self> {
        let listener = TcpListener::bind(config.address).await?;
        let streaming = Self {
            address: listener.local_addr()?,
            requests: Arc::default(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        };
        let server = http::Server {
            runtime,
            requests: Arc::clone(&streaming.requests),
            idle_timeout: config.idle_timeout,
            tasks: streaming.tasks.clone(),
            stopping: streaming.stopping.clone(),
        };
        streaming.tasks.spawn(server.run(listener));
        Ok(streaming)
    }

    /// Keeps a session for the client that connects to the URL which this gives.
    pub fn promise(&self, session: Session) -> Result<String, RequestError> {
        let path = session.path();
        let token = self.requests.insert(Instant::now(), session)?;
        Ok(format!("http://{}/{path}/{token}", self.address))
    }

    /// Ends every session, with the commands that run for them, and waits for that, at most `deadline`.
    pub async fn stop(&self, deadline: Duration) {
        self.stopping.cancel();
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_err() {
            tracing::warn!("not every streaming session has ended");
        }
    }
}
