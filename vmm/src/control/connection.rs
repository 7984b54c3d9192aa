//! One connection to the control socket: frames in, descriptors along with them, frames out.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use isopod_proto::vmm::{ControlReply, ControlRequest};
use isopod_proto::{MAX_CONTROL_MESSAGE, decode_frame, encode_frame};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

const CHUNK: usize = 16 * 1024;
/// Descriptors in one message of the socket (the kernel's SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;
/// Descriptors that wait for their request.
const MAX_WAITING: usize = 2 * MAX_DESCRIPTORS;

/// Descriptors that arrived and belong to requests not yet done, in order.
#[derive(Default)]
pub struct Descriptors(VecDeque<File>);

impl Descriptors {
    /// The first `count`, or as many as there are.
    pub fn take(&mut self, count: usize) -> Vec<File> {
        let count = count.min(self.0.len());
        self.0.drain(..count).collect()
    }
}

/// A connection.
pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    descriptors: Descriptors,
    output: VecDeque<u8>,
}

impl Connection {
    /// Takes over an accepted `stream`.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, input: vec![], descriptors: Descriptors::default(), output: VecDeque::new() })
    }

    /// What to wait for: nothing more is read before what was answered has been taken.
    pub fn interest(&self) -> PollFlags {
        if self.output.is_empty() { PollFlags::IN } else { PollFlags::OUT }
    }

    /// Reads what is there, answers what is whole, sends what fits. False when the connection is over.
    pub fn serve(&mut self, answer: impl FnMut(ControlRequest, &mut Descriptors) -> ControlReply) -> bool {
        let open = if self.output.is_empty() { self.receive() } else { true };
        self.answer_requests(answer) && self.send() && open
    }

    /// Reads once. False at the end of the stream, or when a client breaks the rules.
    fn receive(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message = match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut chunk)], &mut ancillary, flags) {
            Ok(message) => message,
            Err(Errno::INTR | Errno::AGAIN) => return true,
            Err(_) => return false,
        };
        for item in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = item {
                self.descriptors.0.extend(fds.map(File::from));
            }
        }
        self.input.extend_from_slice(&chunk[..message.bytes]);
        message.bytes > 0 && !message.flags.contains(ReturnFlags::CTRUNC) && self.descriptors.0.len() <= MAX_WAITING
    }

    /// Answers the requests that are whole, as long as replies are taken. False for bytes that are no request.
    fn answer_requests(&mut self, mut answer: impl FnMut(ControlRequest, &mut Descriptors) -> ControlReply) -> bool {
        while self.output.is_empty() {
            match decode_frame::<ControlRequest>(&self.input, MAX_CONTROL_MESSAGE) {
                Ok(Some((request, used))) => {
                    self.input.drain(..used);
                    let reply = answer(request, &mut self.descriptors);
                    self.output.extend(encode_frame(&reply));
                    if !self.send() {
                        return false;
                    }
                    if self.input.is_empty() {
                        // Descriptors that no request named.
                        self.descriptors.0.clear();
                    }
                }
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    /// Sends as much as the socket takes. False when the client is gone.
    fn send(&mut self) -> bool {
        while !self.output.is_empty() {
            let (front, _) = self.output.as_slices();
            match self.stream.write(front) {
                Ok(0) => return false,
                Ok(written) => drop(self.output.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests;
