//! Exec and attach: which streams a session has, and its run from the client's streams to the guest's process.
//!
//! Source: `k8s.io/apimachinery/pkg/util/remotecommand` (versions) and the behaviour of client-go's `tools/remotecommand`.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::requests::{Session, Wanted};
use super::spdy::Stream;
use super::status::Outcome;
use super::stream::{Incoming, Outgoing};
use crate::grpc::status::chain;
use crate::runtime::Runtime;
use crate::sandbox::command::Command;
use crate::sandbox::{SandboxError, attach, exec};

/// Protocol versions over SPDY, the best one first.
pub const SPDY_PROTOCOLS: [&str; 4] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
/// How long a client may take to open its streams.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of a message that sets a terminal's size.
const MAX_RESIZE: usize = 1024;

/// A terminal's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The sizes that a client sends for its terminal: one JSON object after the other.
#[derive(Debug)]
pub struct Sizes {
    incoming: Incoming,
    bytes: Vec<u8>,
}

impl Sizes {
    /// The sizes on this stream.
    pub fn new(incoming: Incoming) -> Self {
        Self { incoming, bytes: Vec::new() }
    }

    /// The next size; none if there will be no more, or what comes is no size. It may be dropped and called again.
    pub async fn next(&mut self) -> Option<TerminalSize> {
        loop {
            let mut values = serde_json::Deserializer::from_slice(&self.bytes).into_iter::<TerminalSize>();
            match values.next() {
                Some(Ok(size)) => {
                    let used = values.byte_offset();
                    self.bytes.drain(..used);
                    return Some(size);
                }
                Some(Err(error)) if !error.is_eof() => return None,
                Some(Err(_)) | None if self.bytes.len() > MAX_RESIZE => return None,
                Some(Err(_)) | None => {}
            }
            let bytes = self.incoming.read().await.ok()??;
            self.bytes.extend_from_slice(&bytes);
        }
    }
}

/// The streams of a session, as they were asked for in the RPC.
#[derive(Debug)]
pub struct Streams {
    /// What the client types.
    pub stdin: Option<Incoming>,
    /// Standard output, or that of the terminal.
    pub stdout: Option<Outgoing>,
    /// Standard error; none with a terminal.
    pub stderr: Option<Outgoing>,
    /// Sizes of the client's terminal.
    pub sizes: Option<Sizes>,
}

/// The streams and where the outcome goes.
#[derive(Debug)]
pub struct Client {
    /// The streams.
    pub streams: Streams,
    /// For the outcome.
    pub error: Outgoing,
    /// Whether the outcome is JSON.
    pub json: bool,
}

/// Waits for the streams that a SPDY client of this protocol version has to open. None: it does not open them, or others.
pub async fn gather(mut opened: mpsc::Receiver<Stream>, wanted: Wanted, protocol: &str) -> Option<Client> {
    let resize = wanted.tty && matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io");
    let (mut stdin, mut stdout, mut stderr, mut error, mut sizes) = (None, None, None, None, None);
    let gathered = timeout(OPEN_TIMEOUT, async {
        let missing = |stdin: bool, stdout: bool, stderr: bool, error: bool, sizes: bool| {
            !error || wanted.stdin && !stdin || wanted.stdout && !stdout || wanted.stderr && !stderr || resize && !sizes
        };
        while missing(stdin.is_some(), stdout.is_some(), stderr.is_some(), error.is_some(), sizes.is_some()) {
            let stream = opened.recv().await?;
            let kind = stream.header("streamtype").to_owned();
            let twice = match kind.as_str() {
                "stdin" => stdin.replace(stream).is_some(),
                "stdout" => stdout.replace(stream).is_some(),
                "stderr" => stderr.replace(stream).is_some(),
                "error" => error.replace(stream).is_some(),
                "resize" => sizes.replace(stream).is_some(),
                _ => true,
            };
            if twice {
                tracing::debug!(kind = %kind.chars().take(40).collect::<String>(), "a stream nobody asked for");
                return None;
            }
        }
        Some(())
    });
    gathered.await.ok()??;
    let (incoming, outgoing) = (|stream: Stream| stream.incoming, |stream: Stream| stream.outgoing);
    let streams = Streams {
        stdin: stdin.map(incoming).filter(|_| wanted.stdin),
        stdout: stdout.map(outgoing).filter(|_| wanted.stdout),
        stderr: stderr.map(outgoing).filter(|_| wanted.stderr),
        sizes: sizes.map(incoming).filter(|_| resize).map(Sizes::new),
    };
    Some(Client { streams, error: outgoing(error?), json: protocol == SPDY_PROTOCOLS[0] })
}

/// Runs the session, tells the client how it ended, and ends its streams. Returns soon after `lost`, with the command killed.
pub async fn run(runtime: &Runtime, session: Session, client: Client, lost: &CancellationToken) {
    let Client { mut streams, error, json } = client;
    let outcome = match session {
        Session::Exec { sandbox, container, command, wanted } => {
            let open = |reply| Command::OpenExec(container, command, wanted, reply);
            match runtime.ask(&sandbox, open).await {
                Ok((up, command)) => exec::interact(&up, command, &mut streams, lost).await,
                Err(error) => Err(error),
            }
            .map_or_else(failed, |code| if code == 0 { Outcome::Success } else { Outcome::ExitCode(code) })
        }
        Session::Attach { sandbox, container, wanted } => {
            let open = |reply| Command::OpenAttach(container, wanted, reply);
            match runtime.ask(&sandbox, open).await {
                Ok(target) => attach::attach(target, &mut streams, lost).await,
                Err(error) => Err(error),
            }
            .map_or_else(failed, |()| Outcome::Success)
        }
        Session::PortForward { .. } => return, // It has no such client.
    };
    for stream in [streams.stdout, streams.stderr].into_iter().flatten() {
        let _ = stream.finish().await; // The client may have gone.
    }
    let status = Bytes::from(outcome.encode(json));
    if status.is_empty() || error.write(status).await.is_ok() {
        let _ = error.finish().await; // As above.
    }
}

fn failed(error: SandboxError) -> Outcome {
    Outcome::Failed(chain(&error))
}

#[cfg(test)]
mod tests {
    use super::super::stream::Piece;
    use super::*;

    #[tokio::test]
    async fn sizes_are_read_however_they_are_cut() {
        let (sender, incoming) = Incoming::new();
        let mut sizes = Sizes::new(incoming);
        for piece in ["{\"Width\":80,\"Hei", "ght\":24}\n{\"Width\":1,", "\"Height\":2}"] {
            sender.send(Piece::Bytes(piece.into())).await.expect("room");
        }
        assert_eq!(sizes.next().await, Some(TerminalSize { width: 80, height: 24 }));
        assert_eq!(sizes.next().await, Some(TerminalSize { width: 1, height: 2 }));
        sender.send(Piece::End).await.expect("room");
        assert_eq!(sizes.next().await, None);
    }

    #[tokio::test]
    async fn what_is_no_size_ends_the_sizes() {
        for bytes in ["rubbish".to_owned(), " ".repeat(MAX_RESIZE + 1), "{\"Width\":70000,\"Height\":1}".to_owned()] {
            let (sender, incoming) = Incoming::new();
            sender.send(Piece::Bytes(bytes.into())).await.expect("room");
            assert_eq!(Sizes::new(incoming).next().await, None);
        }
    }
}
