//! The way of the program's own subcommands to the daemon.

use std::path::Path;

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// A connection to the daemon; `None` if none runs.
pub async fn connect(socket: &Path) -> anyhow::Result<Option<Channel>> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    match UnixStream::connect(socket).await {
        Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => return Ok(None),
        tried => drop(tried.with_context(|| format!("cannot connect to {}", socket.display()))?),
    }
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://isopod").connect_with_connector(connector).await;
    channel.map(Some).with_context(|| format!("cannot connect to {}", socket.display()))
}

/// What the daemon says, without the rest of the status.
pub fn said(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
