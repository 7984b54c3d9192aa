//! One connection of the daemon: one request, one reply.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use isopod_proto::files::file_server_request::Request;
use isopod_proto::files::{FileServerReply, FileServerRequest};
use isopod_proto::{MAX_CONTROL_MESSAGE, decode_frame, encode_frame};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// How long a daemon may take to say what it wants.
const DEADLINE: Duration = Duration::from_secs(10);

/// Serves `stream`.
pub fn serve(
    mut stream: UnixStream,
    answer: impl FnOnce(Option<Request>, Option<OwnedFd>) -> FileServerReply,
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let (mut bytes, descriptor) = receive(&stream)?;
    loop {
        if let Some((request, _)) =
            decode_frame::<FileServerRequest>(&bytes, MAX_CONTROL_MESSAGE).map_err(io::Error::other)?
        {
            return stream.write_all(&encode_frame(&answer(request.request, descriptor)));
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

/// The first bytes, and the descriptor that came with them.
fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut chunk = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(stream, &mut [IoSliceMut::new(&mut chunk)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = ancillary.drain().filter_map(|item| match item {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptor = descriptors.next().and_then(|mut descriptors| descriptors.next());
    chunk.truncate(message.bytes);
    Ok((chunk, descriptor))
}
