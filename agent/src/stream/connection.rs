//! One connection to the stream port.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::agent::{StreamKind, StreamOpen, StreamOpened};
use isopod_proto::{MAX_STREAM_HEADER, decode_frame, encode_frame};
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::{Input, OutOfWindow, Output, forward};
use crate::agent::Agent;
use crate::error::{Error, Result};

/// How long the daemon may take to say what it wants.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes in one write to the connection.
const CHUNK: usize = 16 * 1024;

/// Serves a connection until it ends.
pub async fn serve<S>(agent: Arc<Agent>, mut stream: S)
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin,
{
    let Ok(Some((open, rest))) = tokio::time::timeout(OPEN_TIMEOUT, read_open(&mut stream)).await else { return };
    let opened = if open.kind() == StreamKind::Tcp {
        forward::connect(open.port).await.map(Opened::Tcp)
    } else {
        find(&agent, &open)
    };
    let error = opened.as_ref().err().map(Error::chain).unwrap_or_default();
    if stream.write_all(&encode_frame(&StreamOpened { error })).await.is_err() {
        return;
    }
    match opened {
        Ok(Opened::Input(input)) => serve_input(&input, stream, rest).await,
        Ok(Opened::Output(output)) => serve_output(&output, stream, open.offset, rest).await,
        Ok(Opened::Tcp(target)) => forward::relay(stream, &rest, target).await,
        Err(_) => {}
    }
}

enum Opened {
    Input(Arc<Input>),
    Output(Arc<Output>),
    Tcp(TcpStream),
}

/// The request and the bytes that came after it.
async fn read_open(stream: &mut (impl AsyncRead + Unpin)) -> Option<(StreamOpen, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        if let Some((open, used)) = decode_frame::<StreamOpen>(&bytes, MAX_STREAM_HEADER).ok()? {
            bytes.drain(..used);
            return Some((open, bytes));
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

fn find(agent: &Agent, open: &StreamOpen) -> Result<Opened> {
    let process = agent.process(&open.process_id)?;
    let missing = || Error::precondition(format!("process {} has no stream {:?}", open.process_id, open.kind()));
    match open.kind() {
        StreamKind::Unspecified => Err(Error::invalid(format!("stream kind {} is not known", open.kind))),
        StreamKind::Stdin => process.input.clone().map(Opened::Input).ok_or_else(missing),
        kind => {
            let output = process.output(kind).ok_or_else(missing)?;
            let taken = output.change(|window| window.acknowledge(open.offset));
            taken.map_err(|error| Error::invalid(format!("open {kind:?} of process {}: {error}", open.process_id)))?;
            Ok(Opened::Output(output))
        }
    }
}

/// Takes the stream over from the connection before; the result tells when the next one does so.
fn take_over(connection: &watch::Sender<u64>) -> watch::Receiver<u64> {
    connection.send_modify(|number| *number += 1);
    connection.subscribe()
}

async fn serve_input<S: AsyncRead + AsyncWrite + AsFd + Unpin>(input: &Input, mut stream: S, mut bytes: Vec<u8>) {
    let mut taken_over = take_over(&input.connection);
    loop {
        let wrote = tokio::select! {
            wrote = input.write(&bytes) => wrote,
            _ = taken_over.changed() => return,
        };
        if !wrote {
            return;
        }
        bytes.resize(CHUNK, 0);
        let count = tokio::select! {
            count = stream.read(&mut bytes) => count,
            _ = taken_over.changed() => return,
            () = input.closed() => return,
        };
        match count {
            Ok(0) => break,
            Ok(count) => bytes.truncate(count),
            Err(_) => return,
        }
    }
    if !is_hung_up(&stream) {
        input.finish().await;
    }
}

/// Whether the other side has gone, and not only closed its writing side.
pub(super) fn is_hung_up(stream: &impl AsFd) -> bool {
    let mut poll = [PollFd::new(stream, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = rustix::event::poll(&mut poll, Some(&now));
    polled.is_err() || poll[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

async fn serve_output<S>(output: &Output, stream: S, offset: u64, acknowledged: Vec<u8>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut taken_over = take_over(&output.connection);
    let (reader, mut writer) = tokio::io::split(stream);
    tokio::select! {
        _ = taken_over.changed() => {}
        () = take_acknowledgements(output, reader, acknowledged) => {}
        () = send_bytes(output, &mut writer, offset) => {}
        () = output.drained() => {
            // The daemon may still wait for our end of the stream.
            let _ = writer.shutdown().await;
        }
    }
}

/// Ends when the connection cannot be written; after the last byte it closes our side and waits for ever.
async fn send_bytes<S: AsyncWrite>(output: &Output, writer: &mut WriteHalf<S>, mut offset: u64) {
    loop {
        let next = output.wait_until(|window| match window.read(offset, CHUNK) {
            Ok(bytes) if bytes.is_empty() && !window.is_finished() => None,
            other => Some(other),
        });
        // Out of the window: the daemon acknowledged bytes that were not sent on this connection.
        let Ok(bytes) = next.await else { return };
        if bytes.is_empty() {
            break;
        }
        if writer.write_all(&bytes).await.is_err() {
            return;
        }
        offset += bytes.len() as u64;
    }
    if writer.shutdown().await.is_ok() {
        std::future::pending().await
    }
}

/// Ends when the daemon closes the connection or acknowledges what it cannot have.
async fn take_acknowledgements<S: AsyncRead>(output: &Output, mut reader: ReadHalf<S>, mut bytes: Vec<u8>) {
    loop {
        let whole = bytes.len() / 8 * 8;
        for number in bytes[..whole].chunks_exact(8) {
            let offset = u64::from_le_bytes(number.try_into().expect("a chunk has 8 bytes"));
            let result: std::result::Result<(), OutOfWindow> = output.change(|window| window.acknowledge(offset));
            if result.is_err() {
                return;
            }
        }
        bytes.drain(..whole);
        if !matches!(reader.read_buf(&mut bytes).await, Ok(1..)) {
            return;
        }
    }
}
