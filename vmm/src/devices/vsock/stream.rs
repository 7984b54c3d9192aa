//! The host's side of a connection: a stream that never blocks, and the bytes it has not taken yet.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// A stream that answers [`ErrorKind::WouldBlock`] where it would have to wait.
pub(super) trait HostStream {
    /// Reads some bytes; 0 at the end.
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize>;
    /// Writes some bytes.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Ends a direction.
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()>;
}

impl HostStream for UnixStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Read::read(self, bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(self, bytes)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        UnixStream::shutdown(self, how)
    }
}

/// What has become possible on a stream since it was told last (edge triggered).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Readiness {
    pub readable: bool,
    pub writable: bool,
    /// The other end will send no more.
    pub ended: bool,
    /// The other end is closed in both directions.
    pub closed: bool,
}

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReadOutcome {
    Bytes(usize),
    Nothing,
    End,
}

/// A stream and what is on its way to it.
#[derive(Debug)]
pub(super) struct Host<S> {
    stream: S,
    readable: bool,
    writable: bool,
    /// The other end sends no more bytes.
    ended: bool,
    /// The other end takes no more bytes.
    gone: bool,
    outbox: VecDeque<u8>,
    /// Bytes at the front of the outbox that are ours and not the guest's.
    own: usize,
    /// Bytes of the guest's that were taken, or that nobody will take, since [`Host::take_forwarded`].
    forwarded: usize,
}

impl<S: HostStream> Host<S> {
    pub fn new(stream: S) -> Self {
        // Both are tried first: a stream that was ready before it was watched has no edge to tell.
        Self {
            stream,
            readable: true,
            writable: true,
            ended: false,
            gone: false,
            outbox: VecDeque::new(),
            own: 0,
            forwarded: 0,
        }
    }

    /// Takes note of `readiness`, and writes what has waited for it.
    pub fn update(&mut self, readiness: Readiness) {
        self.readable |= readiness.readable || readiness.ended || readiness.closed;
        self.writable |= readiness.writable;
        self.ended |= readiness.ended || readiness.closed;
        if readiness.closed {
            self.lose();
        }
        self.flush();
    }

    /// The stream itself, to be watched.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// `true` if a read may give something.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// `true` if the other end sends no more bytes than are to be read already.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// `true` if the other end takes no more bytes.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// `true` if every byte was taken that will be.
    pub fn is_drained(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Reads into `bytes`, which is not empty.
    pub fn read(&mut self, bytes: &mut [u8]) -> ReadOutcome {
        loop {
            return match self.stream.read(bytes) {
                Ok(0) => ReadOutcome::End,
                Ok(count) => ReadOutcome::Bytes(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    ReadOutcome::Nothing
                }
                // Reset by the other end, which has gone.
                Err(_) => {
                    self.lose();
                    ReadOutcome::End
                }
            };
        }
    }

    /// Sends bytes of our own, before any of the guest's.
    pub fn send_own(&mut self, bytes: &[u8]) {
        debug_assert!(self.outbox.is_empty());
        self.own = bytes.len();
        self.outbox.extend(bytes);
        self.flush();
    }

    /// Sends the guest's bytes; the caller bounds what is on its way.
    pub fn send(&mut self, mut bytes: &[u8]) {
        if self.gone {
            self.forwarded += bytes.len();
            return;
        }
        while self.outbox.is_empty() && self.writable && !self.gone && !bytes.is_empty() {
            match Self::write(&mut self.stream, bytes) {
                Ok(count) => {
                    self.forwarded += count;
                    bytes = &bytes[count..];
                }
                Err(error) => self.stop_writing(&error),
            }
        }
        if self.gone {
            self.forwarded += bytes.len();
        } else {
            self.outbox.extend(bytes);
        }
    }

    /// The guest sends no more: ends the stream too, which is to be called when it is drained.
    pub fn finish(&mut self) {
        // An end that has gone needs no telling.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The guest takes no more: lets the other end's writes fail.
    pub fn refuse_input(&mut self) {
        // As above.
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// How many of the guest's bytes were taken since the last call.
    pub fn take_forwarded(&mut self) -> usize {
        std::mem::take(&mut self.forwarded)
    }

    /// Writes what of `bytes` the stream takes now.
    fn write(stream: &mut S, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match stream.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Takes note of why a write gave nothing.
    fn stop_writing(&mut self, error: &io::Error) {
        match error.kind() {
            ErrorKind::WouldBlock => self.writable = false,
            _ => self.lose(),
        }
    }

    fn flush(&mut self) {
        while self.writable && !self.gone && !self.outbox.is_empty() {
            match Self::write(&mut self.stream, self.outbox.as_slices().0) {
                Ok(count) => {
                    self.outbox.drain(..count);
                    let own = count.min(self.own);
                    self.own -= own;
                    self.forwarded += count - own;
                }
                Err(error) => self.stop_writing(&error),
            }
        }
        if self.outbox.is_empty() {
            // A stream that stalled once does not keep the room for ever.
            self.outbox = VecDeque::new();
        }
    }

    /// The other end takes no more: what it has not taken counts as taken.
    fn lose(&mut self) {
        self.gone = true;
        self.forwarded += self.outbox.len() - self.own.min(self.outbox.len());
        self.own = 0;
        self.outbox = VecDeque::new();
    }
}
