//! The socket to the file server.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use isopod_proto::MAX_FUSE_MESSAGE;

use super::message::{REPLY_HEADER, Reply};

/// Bytes read from the socket at once.
const CHUNK: usize = 256 * 1024;

/// The server has ended, or talks nonsense; there is no going on with it.
#[derive(Debug)]
pub(super) struct Broken(pub io::Error);

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self(error)
    }
}

/// A connection to a file server. Nothing blocks.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    /// A request that the socket has not taken wholly yet, and how much of it it has.
    output: Vec<u8>,
    sent: usize,
    /// What has come of a reply that is not whole yet.
    input: Vec<u8>,
}

impl Link {
    /// Takes over a connected socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        Ok(Self { stream, output: vec![], sent: 0, input: vec![] })
    }

    /// Whether a request may be sent: none is still on its way into the socket.
    pub fn is_free(&self) -> bool {
        self.sent == self.output.len()
    }

    /// The empty buffer for the next request. Only while [`Link::is_free`].
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        self.output.clear();
        self.sent = 0;
        &mut self.output
    }

    /// Sends what the socket takes of the request in the buffer.
    pub fn send(&mut self) -> Result<(), Broken> {
        while self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(Broken(io::ErrorKind::WriteZero.into())),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Broken(error)),
            }
        }
        Ok(())
    }

    /// Reads all that has come, and gives each whole reply to `take`, which says whether it answers a request.
    pub fn receive(&mut self, mut take: impl FnMut(Reply, &[u8]) -> Result<bool, Broken>) -> Result<(), Broken> {
        loop {
            let before = self.input.len();
            self.input.resize(before + CHUNK, 0);
            let read = self.stream.read(&mut self.input[before..]);
            self.input.truncate(before + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => self.take_replies(&mut take)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Broken(error)),
            }
        }
    }

    fn take_replies(&mut self, take: &mut impl FnMut(Reply, &[u8]) -> Result<bool, Broken>) -> Result<(), Broken> {
        let mut rest = self.input.as_slice();
        while let Some(header) = rest.first_chunk::<REPLY_HEADER>() {
            let nonsense = |what| Broken(io::Error::new(io::ErrorKind::InvalidData, what));
            let reply = Reply::parse(header).ok_or_else(|| nonsense("a reply of an impossible length"))?;
            let Some((whole, later)) = rest.split_at_checked(reply.length) else { break };
            if !take(reply, whole)? {
                return Err(nonsense("a reply to nothing that was asked"));
            }
            rest = later;
        }
        let used = self.input.len() - rest.len();
        self.input.drain(..used);
        debug_assert!(self.input.len() <= MAX_FUSE_MESSAGE);
        Ok(())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
