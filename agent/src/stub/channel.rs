//! The socket between the agent and a stub: length-prefixed messages, descriptors by SCM_RIGHTS with a message's first byte.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isopod_proto::{decode_frame, encode_frame};
use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// Most descriptors that come with one message.
const MAX_DESCRIPTORS: usize = 8;
/// Most bytes of a message; a launch carries arguments and environment, which the gRPC limit bounds.
const MAX_MESSAGE: usize = 2 * isopod_proto::MAX_AGENT_MESSAGE;

/// One end of the socket, with what has been received but not yet taken. It does not care whether the socket blocks; on a
/// non-blocking one the calls give `WouldBlock` and can be made again.
pub struct Channel {
    socket: OwnedFd,
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Channel {
    /// The channel over a connected Unix stream socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, bytes: Vec::new(), descriptors: Vec::new() }
    }

    /// Sends `message` with `descriptors` on a blocking socket.
    pub fn send(&self, message: &impl Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let frame = encode_frame(message);
        let mut sent = 0;
        while sent < frame.len() {
            let with = if sent == 0 { descriptors } else { &[] };
            sent += send_some(self.socket.as_fd(), &frame[sent..], with)?;
        }
        Ok(())
    }

    /// Receives one message and every descriptor that came so far. `Ok(None)`: the other side has closed.
    pub fn receive<M: Message + Default>(&mut self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        loop {
            let decoded = decode_frame(&self.bytes, MAX_MESSAGE);
            if let Some((message, used)) = decoded.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))? {
                self.bytes.drain(..used);
                return Ok(Some((message, std::mem::take(&mut self.descriptors))));
            }
            if self.receive_some()? == 0 {
                return Ok(None);
            }
        }
    }

    /// How many bytes the message that has begun still needs. More are never read at once: a read that goes over into the next
    /// message would bring that one's descriptors.
    fn wanted(&self) -> usize {
        match self.bytes.first_chunk::<4>() {
            None => 4 - self.bytes.len(),
            Some(prefix) => 4 + u32::from_le_bytes(*prefix) as usize - self.bytes.len(),
        }
    }

    fn receive_some(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 4096];
        let limit = self.wanted().min(buffer.len());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(&self.socket, &mut [IoSliceMut::new(&mut buffer[..limit])], &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.descriptors.extend(rights);
            }
        }
        self.bytes.extend_from_slice(&buffer[..received.bytes]);
        Ok(received.bytes)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send_some(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent =
        rustix::io::retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL))?;
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stub::message::{Event, Report};

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (ours, mut theirs) = (Channel::new(ours.into()), Channel::new(theirs.into()));
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        ours.send(&Report { event: Some(Event::Forked(7)) }, &[]).unwrap();
        ours.send(&Report { event: Some(Event::Ready(true)) }, &[reader.as_fd()]).unwrap();
        drop(ours);
        let (first, none) = theirs.receive::<Report>().unwrap().unwrap();
        assert_eq!((first.event, none.len()), (Some(Event::Forked(7)), 0));
        let (second, one) = theirs.receive::<Report>().unwrap().unwrap();
        assert_eq!((second.event, one.len()), (Some(Event::Ready(true)), 1));
        assert!(theirs.receive::<Report>().unwrap().is_none());
    }
}
