//! The streams of a session, whatever transport carries them: bytes in order, with an end of their own in each direction.
//!
//! Every queue here is bounded, and whoever is faster waits. A queue that is full holds up the whole connection of its client,
//! as SPDY clients do no flow control, and no other connection.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

/// Pieces that may wait in a stream from the client; each is as large as one read of the connection, 32 KiB, at most.
pub const INCOMING_PIECES: usize = 16;
/// Pieces that may wait to be sent to a client, for all its streams.
pub const OUTGOING_PIECES: usize = 8;
/// Bytes read from a client at once.
pub const CHUNK: usize = 32 * 1024;
/// How often a connection that is not read, its stream being full, is checked for a client that has gone.
const HANG_UP_CHECK: Duration = Duration::from_secs(1);

/// The client has gone, or is done with the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client has gone")]
pub struct Lost;

/// What comes on a stream from the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Some bytes.
    Bytes(Bytes),
    /// The client has closed its half: no more will come.
    End,
}

/// A stream from the client.
#[derive(Debug)]
pub struct Incoming {
    receiver: mpsc::Receiver<Piece>,
    ended: bool,
}

impl Incoming {
    /// A stream, and where what the client sends goes.
    pub fn new() -> (mpsc::Sender<Piece>, Self) {
        let (sender, receiver) = mpsc::channel(INCOMING_PIECES);
        (sender, Self { receiver, ended: false })
    }

    /// Some bytes; none if the client has closed its half.
    pub async fn read(&mut self) -> Result<Option<Bytes>, Lost> {
        if self.ended {
            return Ok(None);
        }
        match self.receiver.recv().await {
            Some(Piece::Bytes(bytes)) => Ok(Some(bytes)),
            Some(Piece::End) => {
                self.ended = true;
                Ok(None)
            }
            None => Err(Lost),
        }
    }
}

/// What is to be sent to the client: on which stream, and what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Some bytes.
    Bytes(u32, Bytes),
    /// Our half is closed.
    End(u32),
}

/// A stream to the client.
#[derive(Clone, Debug)]
pub struct Outgoing {
    sender: mpsc::Sender<Message>,
    stream: u32,
}

impl Outgoing {
    /// Stream number `stream` of the connection that `sender` leads to.
    pub fn new(sender: mpsc::Sender<Message>, stream: u32) -> Self {
        Self { sender, stream }
    }

    /// Sends some bytes, waiting until there is room.
    pub async fn write(&self, bytes: Bytes) -> Result<(), Lost> {
        self.sender.send(Message::Bytes(self.stream, bytes)).await.map_err(|_| Lost)
    }

    /// Closes our half.
    pub async fn finish(self) -> Result<(), Lost> {
        self.sender.send(Message::End(self.stream)).await.map_err(|_| Lost)
    }
}

/// What a connection's parts know of its end.
#[derive(Clone, Debug)]
pub struct Life {
    /// The client has gone, was silent for too long, or the daemon ends.
    pub lost: CancellationToken,
    active: Arc<Mutex<Instant>>,
    socket: Arc<OwnedFd>,
}

impl Life {
    /// The life of the connection on `socket`; it ends with `lost` at the latest.
    pub fn new(socket: Arc<OwnedFd>, lost: CancellationToken) -> Self {
        Self { lost, active: Arc::new(Mutex::new(Instant::now())), socket }
    }

    /// Bytes came from the client, or it took some.
    pub fn is_active(&self) {
        *self.active.lock() = Instant::now();
    }

    /// Waits until nothing has happened for `limit`.
    pub async fn idle(&self, limit: Duration) {
        loop {
            let end = *self.active.lock() + limit;
            if Instant::now() >= end {
                return;
            }
            sleep_until(end).await;
        }
    }

    /// Gives `piece` to its stream. It waits while that is full, unless the client goes, which nobody would see meanwhile. A
    /// piece that nobody wants is dropped. False: the client has gone.
    pub async fn deliver(&self, stream: &mpsc::Sender<Piece>, piece: Piece) -> bool {
        tokio::select! {
            // Fails if the session does not read the stream any more.
            _ = stream.send(piece) => true,
            () = self.lost.cancelled() => false,
            () = self.hung_up() => false,
        }
    }

    /// Waits until the client has closed its connection, whatever of it was read.
    pub async fn hung_up(&self) {
        loop {
            sleep(HANG_UP_CHECK).await;
            let mut poll = [PollFd::new(&*self.socket, PollFlags::RDHUP)];
            let polled = rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
            let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
            if polled.is_err() || poll[0].revents().intersects(gone) {
                return;
            }
        }
    }
}
