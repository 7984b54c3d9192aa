//! The agent's first word to the host.

use std::io;
use std::time::Duration;

use isopod_proto::agent::Hello;
use isopod_proto::{AGENT_PROTOCOL_VERSION, HELLO_PORT, encode_frame};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::AsyncWriteExt as _;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::stats::Memory;

/// Tries before the agent gives up: about half a minute in all.
const TRIES: u32 = 10;
/// The first pause between two tries; each next one is twice as long, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// How long one try may take.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);

/// Tells the host that the agent listens.
///
/// # Errors
/// The last try's, if the host could not be reached.
pub async fn send() -> io::Result<()> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        if try_send().await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    try_send().await
}

async fn try_send() -> io::Result<()> {
    let attempt = async {
        let mut stream = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, HELLO_PORT)).await?;
        stream.write_all(&encode_frame(&hello())).await?;
        stream.shutdown(std::net::Shutdown::Write)
    };
    tokio::time::timeout(TRY_TIMEOUT, attempt).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn hello() -> Hello {
    let memory = Memory::read();
    let uptime = clock_gettime(ClockId::Boottime);
    let nanos = uptime.tv_sec.saturating_mul(1_000_000_000).saturating_add(uptime.tv_nsec);
    Hello {
        protocol_version: AGENT_PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        memory_total_bytes: memory.total,
        memory_available_bytes: memory.available,
        uptime_nanos: u64::try_from(nanos).unwrap_or(0),
    }
}
