//! Sessions whose streams are channels of a WebSocket.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::SplitSink;
use futures_util::{SinkExt, StreamExt};
use isopod_proto::ObjectId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::Protocol;
use crate::runtime::Runtime;
use crate::sandbox::driver::Command;
use crate::streaming::port_forward::relay;
use crate::streaming::remote_command::{Client, Sizes, Streams};
use crate::streaming::requests::Wanted;
use crate::streaming::stream::{self, Incoming, Life, OUTGOING_PIECES, Outgoing, Piece};

const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;
const ERROR: u32 = 3;
const RESIZE: u32 = 4;
/// The byte after it is the number of a channel that the client has closed.
const CLOSE: u8 = 255;
/// Ports that the old protocol forwards in one connection.
const MAX_PORTS: usize = 32;
/// How long a client may take to confirm the end.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The end of a session as it should be.
pub(super) fn normal_end() -> CloseFrame {
    CloseFrame { code: CloseCode::Normal, reason: "".into() }
}

/// A message as its channel and bytes; none if it is not of the protocol.
fn decode(protocol: Protocol, message: Message) -> Option<(u8, Bytes)> {
    match message {
        Message::Binary(mut bytes) if !protocol.base64 && !bytes.is_empty() => {
            let channel = bytes.split_to(1)[0];
            Some((channel, bytes))
        }
        Message::Text(text) if protocol.base64 => {
            let (channel, encoded) = text.as_str().split_at_checked(1)?;
            Some((channel.parse().ok()?, STANDARD.decode(encoded).ok()?.into()))
        }
        _ => None,
    }
}

fn encode(protocol: Protocol, channel: u32, bytes: &[u8]) -> Message {
    if protocol.base64 {
        return Message::text(format!("{channel}{}", STANDARD.encode(bytes)));
    }
    let mut message = BytesMut::with_capacity(1 + bytes.len());
    message.put_u8(channel as u8);
    message.put_slice(bytes);
    Message::binary(message.freeze())
}

/// Serves exec or attach: `session` gets the streams, and has ended when this returns.
pub async fn serve<S, F>(
    io: S,
    protocol: Protocol,
    wanted: Wanted,
    life: Life,
    idle_limit: Duration,
    session: impl FnOnce(Client) -> F,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = ()>,
{
    let (messages, queue) = mpsc::channel(OUTGOING_PIECES);
    let outgoing = |channel| Outgoing::new(messages.clone(), channel);
    let mut halves: Vec<Option<mpsc::Sender<Piece>>> = vec![None; RESIZE as usize + 1];
    let mut incoming = |channel: u32, wanted: bool| {
        wanted.then(|| {
            let (half, incoming) = Incoming::new();
            halves[channel as usize] = Some(half);
            incoming
        })
    };
    let streams = Streams {
        stdin: incoming(STDIN, wanted.stdin),
        stdout: wanted.stdout.then(|| outgoing(STDOUT)),
        stderr: wanted.stderr.then(|| outgoing(STDERR)),
        sizes: incoming(RESIZE, wanted.tty).map(Sizes::new),
    };
    // An empty message tells the client that the session has begun.
    let first = [(STDOUT, wanted.stdout), (STDERR, wanted.stderr), (ERROR, true)];
    let first = first.into_iter().find_map(|(channel, wanted)| wanted.then_some(channel)).unwrap_or(ERROR);
    let _ = messages.try_send(stream::Message::Bytes(first, Bytes::new())); // There is room.
    let client = Client { streams, error: outgoing(ERROR), json: protocol.json };
    drop(messages);
    connection(io, protocol, halves, queue, life, idle_limit, session(client)).await;
}

/// Serves port-forward as the old protocol has it: for each port a channel for data and one for an error, both of which begin
/// with the port, little endian.
pub async fn forward<S>(
    runtime: &Runtime,
    sandbox: ObjectId,
    ports: &[u16],
    io: S,
    protocol: Protocol,
    life: Life,
    idle_limit: Duration,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (messages, queue) = mpsc::channel(OUTGOING_PIECES);
    let (mut halves, mut pairs) = (Vec::new(), Vec::new());
    for (number, port) in ports.iter().take(MAX_PORTS).enumerate() {
        let channel = 2 * number as u32;
        let (half, incoming) = Incoming::new();
        halves.extend([Some(half), None]);
        let outgoing = |channel| Outgoing::new(messages.clone(), channel);
        pairs.push((*port, incoming, outgoing(channel), outgoing(channel + 1)));
    }
    drop(messages);
    let lost = life.lost.clone();
    let session = async {
        let Ok(up) = runtime.ask(&sandbox, Command::OpenPorts).await else { return };
        let guest = &up.guest;
        let all = pairs.into_iter().map(|(port, incoming, data, error)| async move {
            let begin = Bytes::copy_from_slice(&port.to_le_bytes());
            if data.write(begin.clone()).await.is_err() || error.write(begin).await.is_err() {
                return;
            }
            if let Err(message) = relay(guest, port, incoming, data).await {
                let _ = error.write(message.into()).await; // The client may have gone.
            }
        });
        tokio::select! {
            _ = futures_util::future::join_all(all) => {}
            () = lost.cancelled() => {}
        }
    };
    connection(io, protocol, halves, queue, life, idle_limit, session).await;
}

/// Runs the session and carries messages between its queues and the client, until both are done.
async fn connection<S: AsyncRead + AsyncWrite + Unpin>(
    io: S,
    protocol: Protocol,
    mut halves: Vec<Option<mpsc::Sender<Piece>>>,
    mut queue: mpsc::Receiver<stream::Message>,
    life: Life,
    idle_limit: Duration,
    session: impl Future<Output = ()>,
) {
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(super::config())).await;
    let (mut sink, mut messages) = socket.split();
    let read = async {
        while let Some(Ok(message)) = messages.next().await {
            life.is_active();
            if matches!(message, Message::Ping(_) | Message::Pong(_)) {
                continue; // Answered by the library.
            }
            let Some((channel, bytes)) = decode(protocol, message) else { break };
            if !take(protocol, &mut halves, channel, bytes, &life).await {
                break;
            }
        }
        life.lost.cancel();
    };
    let write = async {
        tokio::select! {
            sent = send(protocol, &mut queue, &mut sink, &life) => {
                if sent.is_ok() {
                    // The client confirms by its own end.
                    let _ = timeout(CLOSE_TIMEOUT, life.lost.cancelled()).await;
                }
            }
            () = life.lost.cancelled() => {}
        }
        // Those who still send find the client gone.
        queue.close();
        life.lost.cancel();
    };
    let watch = async {
        tokio::select! {
            () = life.idle(idle_limit) => life.lost.cancel(),
            () = life.lost.cancelled() => {}
        }
    };
    let read = async {
        tokio::select! { () = read => {}, () = life.lost.cancelled() => {} }
    };
    tokio::join!(session, read, write, watch);
}

/// False: the client has gone, or breaks the protocol.
async fn take(
    protocol: Protocol,
    halves: &mut [Option<mpsc::Sender<Piece>>],
    channel: u8,
    bytes: Bytes,
    life: &Life,
) -> bool {
    let (channel, piece) = match (protocol.close && channel == CLOSE, bytes.first()) {
        (true, Some(closed)) => (*closed, Piece::End),
        (true, None) => return false,
        (false, None) => return true,
        (false, Some(_)) => (channel, Piece::Bytes(bytes)),
    };
    let Some(slot) = halves.get_mut(usize::from(channel)) else { return true };
    let Some(half) = slot else { return true };
    let ends = piece == Piece::End;
    let delivered = life.deliver(half, piece).await;
    if ends {
        *slot = None;
    }
    delivered
}

async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    protocol: Protocol,
    queue: &mut mpsc::Receiver<stream::Message>,
    sink: &mut SplitSink<WebSocketStream<S>, Message>,
    life: &Life,
) -> Result<(), Error> {
    while let Some(message) = queue.recv().await {
        // The end of a channel of ours is the end of the connection: no version tells it apart.
        let stream::Message::Bytes(channel, bytes) = message else { continue };
        sink.send(encode(protocol, channel, &bytes)).await?;
        life.is_active();
    }
    sink.send(Message::Close(Some(normal_end()))).await
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{PROTOCOLS, UNNAMED};
    use super::*;

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            channel in 0u32..5, bytes in proptest::collection::vec(any::<u8>(), 0..200), which in 0usize..6,
        ) {
            let protocol = PROTOCOLS.get(which).copied().unwrap_or(UNNAMED);
            let decoded = decode(protocol, encode(protocol, channel, &bytes));
            prop_assert_eq!(decoded, Some((channel as u8, Bytes::from(bytes))));
        }

        #[test]
        fn any_message_is_decoded_or_refused(text in ".{0,40}", bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            for protocol in PROTOCOLS {
                let _ = decode(protocol, Message::text(text.clone()));
                let _ = decode(protocol, Message::binary(bytes.clone()));
            }
        }
    }
}
