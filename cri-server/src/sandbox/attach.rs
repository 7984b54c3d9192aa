//! Attaching to a container's own process.
//!
//! Output goes to every client that is attached, from the moment it attaches, besides the log: the follower of the container
//! hands each chunk to the [`Attachers`] and never waits for them. A client that falls [`MOST_QUEUED`] bytes behind is
//! detached, with an error that says so; neither the container, nor its log, nor another client is slowed down by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use isopod_proto::ObjectId;
use isopod_proto::agent::ResizeTerminalRequest;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::SandboxError;
use super::bring_up::Up;
use crate::container::log::LogStream;
use crate::grpc::status::chain;
use crate::guest::{Guest, GuestError, Input, SHORT};
use crate::streaming::remote_command::{Sizes, Streams};
use crate::streaming::stream::Incoming;

/// How far a client may fall behind the output.
const MOST_QUEUED: usize = 1024 * 1024;
/// How long the end of the input may take to reach the process after a detach.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// The clients that are attached to one container.
#[derive(Debug, Default)]
pub struct Attachers(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// How many bytes of standard output and error were handed out. After a lost connection some come again.
    handed_out: [u64; 2],
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    queue: mpsc::UnboundedSender<(LogStream, Bytes)>,
    level: Arc<Level>,
}

#[derive(Debug, Default)]
struct Level {
    queued: AtomicUsize,
    overflown: AtomicBool,
}

/// What an attached client is to be sent.
#[derive(Debug)]
pub struct Subscription {
    queue: mpsc::UnboundedReceiver<(LogStream, Bytes)>,
    level: Arc<Level>,
}

impl Attachers {
    /// The output from now on.
    pub fn subscribe(&self) -> Subscription {
        let (sender, queue) = mpsc::unbounded_channel();
        let level = Arc::new(Level::default());
        self.0.lock().clients.push(Client { queue: sender, level: Arc::clone(&level) });
        Subscription { queue, level }
    }

    /// Hands out `bytes`, which begin at byte `offset` of the stream.
    pub fn publish(&self, stream: LogStream, offset: u64, bytes: &[u8]) {
        let mut state = self.0.lock();
        let handed_out = &mut state.handed_out[stream as usize];
        let known = handed_out.saturating_sub(offset).min(bytes.len() as u64) as usize;
        *handed_out = (*handed_out).max(offset + bytes.len() as u64);
        let news = &bytes[known..];
        if news.is_empty() || state.clients.is_empty() {
            return;
        }
        let news = Bytes::copy_from_slice(news);
        state.clients.retain(|client| client.offer(stream, &news));
    }
}

impl Client {
    /// False: it has gone, or is too slow.
    fn offer(&self, stream: LogStream, bytes: &Bytes) -> bool {
        if self.level.queued.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len() > MOST_QUEUED {
            self.level.overflown.store(true, Ordering::Relaxed);
            return false;
        }
        self.queue.send((stream, bytes.clone())).is_ok()
    }
}

impl Subscription {
    /// The next bytes; none when the container has ended.
    pub async fn next(&mut self) -> Result<Option<(LogStream, Bytes)>, SandboxError> {
        let Some((stream, bytes)) = self.queue.recv().await else {
            // Set before the queue was closed.
            return match self.level.overflown.load(Ordering::Relaxed) {
                true => Err(SandboxError::Detached { limit: MOST_QUEUED }),
                false => Ok(None),
            };
        };
        self.level.queued.fetch_sub(bytes.len(), Ordering::Relaxed);
        Ok(Some((stream, bytes)))
    }
}

/// The input of a container, which its attached clients share.
#[derive(Debug, Default)]
pub struct SharedInput(tokio::sync::Mutex<InputState>);

#[derive(Default)]
enum InputState {
    #[default]
    Closed,
    Open(Input),
    /// The process has been told that there is no more.
    Finished,
}

impl std::fmt::Debug for InputState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Closed => "Closed",
            Self::Open(_) => "Open",
            Self::Finished => "Finished",
        })
    }
}

impl SharedInput {
    async fn write(&self, guest: &Guest, process: &str, bytes: &[u8]) -> Result<(), GuestError> {
        let mut state = self.0.lock().await;
        if matches!(*state, InputState::Closed) {
            *state = InputState::Open(guest.input(process).await?);
        }
        if let InputState::Open(input) = &mut *state
            && let Err(error) = input.write_all(bytes).await
        {
            // The connection to the guest was lost, or the process reads no more: the next write finds out which.
            tracing::debug!(%error, "input of a container is lost");
            *state = InputState::Closed;
        }
        Ok(())
    }

    async fn finish(&self, guest: &Guest, process: &str) -> Result<(), GuestError> {
        let mut state = self.0.lock().await;
        let input = match std::mem::replace(&mut *state, InputState::Finished) {
            InputState::Open(input) => input,
            InputState::Closed => guest.input(process).await?,
            InputState::Finished => return Ok(()),
        };
        // A process that has ended needs no end of its input.
        let _ = input.finish().await;
        Ok(())
    }
}

/// What a client attaches to.
pub struct Target {
    /// The sandbox's guest.
    pub up: Up,
    /// The container.
    pub container: ObjectId,
    /// Its output from now on.
    pub output: Subscription,
    /// Its input.
    pub input: Arc<SharedInput>,
    /// The input ends with the first session that has it.
    pub stdin_once: bool,
}

/// Carries bytes between a client and a container's process until the container ends or the client goes.
pub async fn attach(target: Target, streams: &mut Streams, lost: &CancellationToken) -> Result<(), SandboxError> {
    let Target { up, container, mut output, input, stdin_once } = target;
    let process = container.to_string();
    let (stdin, sizes) = (streams.stdin.take(), streams.sizes.take());
    let has_input = stdin.is_some();
    let copy_output = async {
        while let Some((stream, bytes)) = output.next().await? {
            let client = match stream {
                LogStream::Stdout => &streams.stdout,
                LogStream::Stderr => &streams.stderr,
            };
            if let Some(client) = client
                && client.write(bytes).await.is_err()
            {
                break;
            }
        }
        Ok(())
    };
    let beside = async {
        tokio::join!(copy_input(&up, &process, &input, stdin, stdin_once), resize(&up, &process, sizes));
        std::future::pending::<()>().await;
    };
    let result = tokio::select! {
        result = copy_output => result,
        () = beside => Ok(()),
        () = lost.cancelled() => Ok(()),
    };
    if has_input && stdin_once {
        match timeout(FINISH_TIMEOUT, input.finish(&up.guest, &process)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(error = chain(&error), "the input of a container is not ended"),
            Err(_) => tracing::debug!("the input of a container is not ended in time"),
        }
    }
    result
}

async fn copy_input(up: &Up, process: &str, input: &SharedInput, stdin: Option<Incoming>, once: bool) {
    let Some(mut stdin) = stdin else { return };
    let failed = |error: GuestError| tracing::debug!(error = chain(&error), "no input for a container");
    loop {
        match stdin.read().await {
            Ok(Some(bytes)) => {
                if let Err(error) = input.write(&up.guest, process, &bytes).await {
                    return failed(error);
                }
            }
            // Without `once` other sessions may follow, and the process must not see an end.
            Ok(None) if once => return input.finish(&up.guest, process).await.unwrap_or_else(failed),
            Ok(None) | Err(_) => return,
        }
    }
}

/// Passes the sizes of the client's terminal on to that of `process`.
pub async fn resize(up: &Up, process: &str, sizes: Option<Sizes>) {
    let Some(mut sizes) = sizes else { return };
    while let Some(size) = sizes.next().await {
        let mut client = up.guest.client();
        let request = ResizeTerminalRequest {
            process_id: process.to_owned(),
            columns: size.width.into(),
            rows: size.height.into(),
        };
        if let Err(error) = Guest::call("ResizeTerminal", SHORT, client.resize_terminal(request)).await {
            tracing::debug!(error = chain(&error), "a terminal keeps its size");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn text(subscription: &mut Subscription, length: usize) -> String {
        let mut text = String::new();
        while text.len() < length {
            let next = timeout(Duration::from_secs(5), subscription.next()).await.expect("in time");
            text.push_str(std::str::from_utf8(&next.expect("fast enough").expect("more").1).expect("text"));
        }
        text
    }

    #[tokio::test]
    async fn each_client_gets_all_from_now_on_and_nothing_twice() {
        let attachers = Attachers::default();
        attachers.publish(LogStream::Stdout, 0, b"before ");
        let mut first = attachers.subscribe();
        attachers.publish(LogStream::Stdout, 7, b"one ");
        let mut second = attachers.subscribe();
        // A connection to the guest was lost, and a part comes again; the other stream has offsets of its own.
        attachers.publish(LogStream::Stdout, 3, b"ore one two ");
        attachers.publish(LogStream::Stdout, 3, b"ore one ");
        attachers.publish(LogStream::Stderr, 0, b"err ");
        assert_eq!(text(&mut first, 12).await, "one two err ");
        assert_eq!(text(&mut second, 8).await, "two err ");
        drop(attachers);
        assert_eq!(first.next().await.expect("ended, not cut"), None);
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_detached_and_no_other_one() {
        let attachers = Attachers::default();
        let (mut stalled, mut reading) = (attachers.subscribe(), attachers.subscribe());
        let chunk = [b'x'; 32 * 1024];
        let (mut offset, mut read) = (0, 0);
        for _ in 0..100 {
            attachers.publish(LogStream::Stdout, offset, &chunk);
            offset += chunk.len() as u64;
            read += reading.next().await.expect("fast enough").expect("more").1.len();
        }
        assert_eq!(read as u64, offset);
        let mut got = 0;
        let error = loop {
            match stalled.next().await {
                Ok(Some((_, bytes))) => got += bytes.len(),
                Ok(None) => panic!("it was not told"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, SandboxError::Detached { .. }), "{error}");
        assert_eq!(got, MOST_QUEUED);
    }
}
