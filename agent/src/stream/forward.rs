//! A TCP connection to the pod's own loopback, on the daemon's behalf.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use isopod_proto::ErrorKind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::connection::is_hung_up;
use crate::error::{Error, Result};

/// How long a server in the pod may take to accept. Both addresses together stay below the daemon's patience for a stream.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
/// Bytes copied at once.
const CHUNK: usize = 32 * 1024;
/// How often a connection whose daemon sends no more is checked for the daemon having gone.
const HANG_UP_CHECK: Duration = Duration::from_secs(1);

/// Connects to `port` of 127.0.0.1, or else of ::1, in the network of the pod, which is the agent's own.
pub async fn connect(port: u32) -> Result<TcpStream> {
    let number = u16::try_from(port).ok().filter(|port| *port != 0);
    let number = number.ok_or_else(|| Error::invalid(format!("{port} is not a TCP port")))?;
    let mut failures = Vec::new();
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        match timeout(CONNECT_TIMEOUT, TcpStream::connect(SocketAddr::new(address, number))).await {
            Ok(Ok(stream)) => {
                // What a terminal types is not to wait for more; that it cannot be set costs time, nothing else.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => failures.push(format!("{address}: {error}")),
            Err(_) => failures.push(format!("{address}: no answer within {} s", CONNECT_TIMEOUT.as_secs())),
        }
    }
    let message = format!("cannot connect to port {port} of the pod ({})", failures.join("; "));
    Err(Error::new(ErrorKind::Unavailable, message))
}

/// Copies in both directions until both have ended, or either side is gone. `first` came from the daemon already.
pub async fn relay<S>(daemon: S, first: &[u8], mut target: TcpStream)
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin,
{
    // The halves of the daemon's stream hide its descriptor, which tells whether it has gone.
    let Ok(watched) = daemon.as_fd().try_clone_to_owned() else { return };
    let (mut from_daemon, mut to_daemon) = tokio::io::split(daemon);
    let (mut from_target, mut to_target) = target.split();
    let upload = async {
        to_target.write_all(first).await?;
        copy(&mut from_daemon, &mut to_target).await
    };
    let download = copy(&mut from_target, &mut to_daemon);
    tokio::pin!(upload, download);
    tokio::select! {
        result = &mut upload => {
            if result.is_ok() && !is_hung_up(&watched) {
                tokio::select! {
                    // Whatever it is, it is over.
                    _ = &mut download => {}
                    () = hang_up(&watched) => {}
                }
            }
        }
        result = &mut download => {
            if result.is_ok() {
                let _ = upload.await; // As above.
            }
        }
    }
}

/// Copies to the end of `from` and passes that on.
async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
    }
}

/// Waits until the daemon has gone. The end of what it sends was read, so nothing but a check tells.
async fn hang_up(watched: &impl AsFd) {
    while !is_hung_up(watched) {
        sleep(HANG_UP_CHECK).await;
    }
}
