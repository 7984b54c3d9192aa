//! Clients of the streaming server.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use bytes::BytesMut;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::streaming::remote_command::Client;
use crate::streaming::requests::Wanted;
use crate::streaming::spdy::{self, frame, headers::Compressor};
use crate::streaming::stream::{Incoming, Life, Outgoing};
use crate::streaming::websocket;

/// Bytes on their way in each direction: more than any input has.
const PIPE: usize = 1 << 20;
const IDLE: Duration = Duration::from_secs(60);

/// Runs a session in which a client sends `bytes` and goes.
fn session<F: Future<Output = ()>>(bytes: &[u8], serve: impl FnOnce(DuplexStream, Life) -> F) {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    }
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    drop(theirs);
    let life = Life::new(Arc::new(OwnedFd::from(ours)), CancellationToken::new());
    let (mut client, server) = tokio::io::duplex(PIPE);
    let client = async move {
        for piece in bytes.chunks(bytes.len().div_ceil(3).max(1)) {
            // The server may have had enough.
            let _ = client.write_all(piece).await;
            tokio::task::yield_now().await;
        }
    };
    RUNTIME.with(|runtime| runtime.block_on(async { tokio::join!(serve(server, life), client) }));
}

async fn echo(mut from: Incoming, to: Outgoing) {
    while let Ok(Some(bytes)) = from.read().await {
        if to.write(bytes).await.is_err() {
            return;
        }
    }
    let _ = to.finish().await;
}

/// A part of what a client of SPDY sends.
#[derive(Debug, Arbitrary)]
enum SpdyPart {
    Open { id: u8, headers: Vec<(u8, String)> },
    Data { id: u8, bytes: Vec<u8>, fin: bool },
    Reset { id: u8 },
    Ping { id: u32 },
    GoAway { id: u32 },
    Reply { id: u8, block: Vec<u8> },
    Raw(Vec<u8>),
}

/// SPDY frames to a server whose sessions send everything back.
pub fn spdy(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let (mut out, mut compressor) = (BytesMut::new(), Compressor::default());
    while !input.is_empty() && out.len() < PIPE / 4 {
        let Ok(part) = SpdyPart::arbitrary(&mut input) else { break };
        match part {
            SpdyPart::Open { id, headers } => {
                let names = ["streamtype", "port", "requestid", ":x"];
                let headers: Vec<_> =
                    headers.iter().map(|(name, value)| (names[usize::from(name % 4)], value.as_str())).collect();
                frame::put_syn_stream(&mut out, id.into(), &compressor.write(&headers));
            }
            SpdyPart::Data { id, bytes, fin } => frame::put_data(&mut out, id.into(), &bytes, fin),
            SpdyPart::Reset { id } => frame::put_reset(&mut out, id.into(), 5),
            SpdyPart::Ping { id } => frame::put_ping(&mut out, id),
            SpdyPart::GoAway { id } => frame::put_go_away(&mut out, id),
            SpdyPart::Reply { id, block } => frame::put_reply(&mut out, id.into(), &block),
            SpdyPart::Raw(bytes) => out.extend_from_slice(&bytes),
        }
    }
    session(&out, |io, life| {
        spdy::serve(io, life, IDLE, |mut streams| async move {
            let mut sessions = JoinSet::new();
            while let Some(stream) = streams.recv().await {
                assert!(stream.header("streamtype").len() < 1 << 20);
                sessions.spawn(echo(stream.incoming, stream.outgoing));
            }
            sessions.join_all().await;
        })
    });
}

/// A part of what a WebSocket client sends.
#[derive(Debug, Arbitrary)]
enum SocketPart {
    Frame { fin: bool, opcode: u8, channel: u8, bytes: Vec<u8> },
    Text { channel: u8, base64: String },
    Raw(Vec<u8>),
}

fn put_frame(out: &mut Vec<u8>, head: u8, payload: &[u8]) {
    out.push(head);
    match payload.len() {
        length @ 0..126 => out.push(0x80 | length as u8),
        length => {
            out.push(0x80 | 126);
            out.extend((length as u16).to_be_bytes());
        }
    }
    // A mask of zeroes.
    out.extend([0; 4]);
    out.extend(payload);
}

/// Messages of a WebSocket, in the protocol that the first byte chooses, to a session that sends its input back.
pub fn web_socket(input: &[u8]) {
    let Some((choice, input)) = input.split_first() else { return };
    let protocol = websocket::PROTOCOLS[usize::from(*choice) % websocket::PROTOCOLS.len()];
    let wanted = Wanted { stdin: true, stdout: true, stderr: choice & 0x40 != 0, tty: choice & 0x80 != 0 };
    let mut input = Unstructured::new(input);
    let mut out = Vec::new();
    while !input.is_empty() && out.len() < PIPE / 4 {
        let Ok(part) = SocketPart::arbitrary(&mut input) else { break };
        match part {
            SocketPart::Frame { fin, opcode, channel, bytes } => {
                let payload = [&[channel], &bytes[..bytes.len().min(60_000)]].concat();
                put_frame(&mut out, (u8::from(fin) << 7) | (opcode % 16), &payload);
            }
            SocketPart::Text { channel, base64 } => {
                let text: String = base64.chars().take(10_000).collect();
                put_frame(&mut out, 0x81, format!("{}{text}", channel % 10).as_bytes());
            }
            SocketPart::Raw(bytes) => out.extend(bytes),
        }
    }
    session(&out, |io, life| {
        let lost = life.lost.clone();
        websocket::serve(io, protocol, wanted, life, IDLE, |client| async move {
            let Client { streams, error, .. } = client;
            let sizes = async {
                if let Some(mut sizes) = streams.sizes {
                    while sizes.next().await.is_some() {}
                }
            };
            let copy = async {
                if let (Some(stdin), Some(stdout)) = (streams.stdin, streams.stdout) {
                    echo(stdin, stdout).await;
                }
            };
            // As in `remote_command::run`: a session ends with its client.
            tokio::select! {
                _ = async { tokio::join!(sizes, copy) } => drop(error.finish().await),
                () = lost.cancelled() => {}
            }
        })
    });
}
