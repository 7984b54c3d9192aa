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
use crate::sandbox::command::Command;
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
    use std::sync::Arc;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;
    use tokio_util::sync::CancellationToken;

    use super::super::{PROTOCOLS, UNNAMED};
    use super::*;

    /// What a client may send.
    #[derive(Clone, Debug)]
    enum Sent {
        /// A message; with a number, in two frames that are cut there.
        Data(u8, Vec<u8>, Option<usize>),
        Ping(Vec<u8>),
        /// One of [`BROKEN`].
        Broken(usize),
    }

    /// Frames after which there is no way on, in any of the protocols. The masks are zero.
    const BROKEN: [&[u8]; 7] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x82\x02\x00a",                                            // No mask.
        b"\x83\x80\x00\x00\x00\x00",                                 // A reserved kind.
        b"\xc2\x82\x00\x00\x00\x000a",                               // A reserved bit.
        b"\x80\x81\x00\x00\x00\x00x",                                // The rest of nothing.
        b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00", // 8 EiB.
        b"\x82\x80\x00\x00\x00\x00",                                 // No channel.
    ];

    fn sent() -> impl Strategy<Value = Sent> {
        let data = (prop_oneof![4 => Just(0u8), 1 => 1u8..6], vec(any::<u8>(), 0..300), any::<Option<usize>>());
        prop_oneof![
            16 => data.prop_map(|(channel, bytes, cut)| Sent::Data(channel, bytes, cut)),
            1 => vec(any::<u8>(), 0..3).prop_map(|bytes| Sent::Data(CLOSE, bytes, None)),
            1 => Just(Sent::Data(CLOSE, vec![STDIN as u8], None)),
            2 => vec(any::<u8>(), 0..100).prop_map(Sent::Ping),
            1 => (0..BROKEN.len()).prop_map(Sent::Broken),
        ]
    }

    /// Appends a frame of a client.
    fn put_frame(out: &mut Vec<u8>, first: u8, payload: &[u8]) {
        let mask = [0x12, 0x34, 0x56, out.len() as u8];
        out.push(first);
        match payload.len() {
            short @ 0..126 => out.push(0x80 | short as u8),
            long => out.extend([&[0x80 | 126], &(long as u16).to_be_bytes()[..]].concat()),
        }
        out.extend(mask);
        out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    }

    /// The bytes of it all, and what of them the command has to read.
    fn written(protocol: Protocol, all: &[Sent]) -> (Vec<u8>, Vec<u8>) {
        let (mut out, mut stdin) = (Vec::new(), Vec::new());
        let (mut reads, mut goes_on) = (true, true);
        for sent in all {
            match sent {
                // It has no digit.
                Sent::Data(CLOSE, ..) if protocol.base64 => {}
                Sent::Data(channel, bytes, cut) => {
                    let message = encode(protocol, u32::from(*channel), bytes);
                    let (kind, payload) = (if message.is_text() { 1 } else { 2 }, message.into_data());
                    match cut.map(|cut| payload.split_at(cut % payload.len())) {
                        Some((head, tail)) => {
                            put_frame(&mut out, kind, head);
                            put_frame(&mut out, 0x80, tail);
                        }
                        None => put_frame(&mut out, 0x80 | kind, &payload),
                    }
                    let closed = bytes.first().filter(|_| protocol.close && *channel == CLOSE);
                    goes_on &= !(protocol.close && *channel == CLOSE && bytes.is_empty());
                    reads &= closed != Some(&(STDIN as u8));
                    if goes_on && reads && u32::from(*channel) == STDIN {
                        stdin.extend(bytes);
                    }
                }
                Sent::Ping(bytes) => put_frame(&mut out, 0x89, bytes),
                Sent::Broken(which) => {
                    out.extend(BROKEN[*which]);
                    goes_on = false;
                }
            }
        }
        (out, stdin)
    }

    /// What a command reads from a client that sends `bytes` and goes.
    async fn read_from(protocol: Protocol, bytes: Vec<u8>) -> Vec<u8> {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        theirs.write_all(&bytes).await.expect("room");
        theirs.shutdown().await.expect("open");
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let life = Life::new(Arc::new(socket.into()), CancellationToken::new());
        let (lost, mut got) = (life.lost.clone(), Vec::new());
        let all = &mut got;
        let session = |mut client: Client| async move {
            let mut stdin = client.streams.stdin.take().expect("wanted");
            loop {
                let read = tokio::select! {
                    biased;
                    read = stdin.read() => read,
                    () = lost.cancelled() => return,
                };
                match read {
                    Ok(Some(bytes)) => all.extend_from_slice(&bytes),
                    Ok(None) | Err(_) => return,
                }
            }
        };
        let wanted = Wanted { stdin: true, stdout: true, ..Wanted::default() };
        let served = serve(ours, protocol, wanted, life, Duration::from_secs(3600), session);
        timeout(Duration::from_secs(60), served).await.expect("it ends with its client");
        got
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            channel in 0u32..5, bytes in vec(any::<u8>(), 0..200), which in 0usize..6,
        ) {
            let protocol = PROTOCOLS.get(which).copied().unwrap_or(UNNAMED);
            let decoded = decode(protocol, encode(protocol, channel, &bytes));
            prop_assert_eq!(decoded, Some((channel as u8, Bytes::from(bytes))));
        }

        #[test]
        fn any_message_is_decoded_or_refused(text in ".{0,40}", bytes in vec(any::<u8>(), 0..40)) {
            for protocol in PROTOCOLS {
                let _ = decode(protocol, Message::text(text.clone()));
                let _ = decode(protocol, Message::binary(bytes.clone()));
            }
        }

        #[test]
        fn a_command_reads_what_came_before_the_first_broken_frame(all in vec(sent(), 0..30), which in 0usize..6) {
            let protocol = PROTOCOLS.get(which).copied().unwrap_or(UNNAMED);
            let (bytes, expected) = written(protocol, &all);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            prop_assert_eq!(runtime.block_on(read_from(protocol, bytes)), expected);
        }

        #[test]
        fn any_bytes_end_with_their_client(bytes in vec(any::<u8>(), 0..500), which in 0usize..6) {
            let protocol = PROTOCOLS.get(which).copied().unwrap_or(UNNAMED);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let read = runtime.block_on(read_from(protocol, bytes.clone()));
            prop_assert!(read.len() <= bytes.len());
        }
    }
}
