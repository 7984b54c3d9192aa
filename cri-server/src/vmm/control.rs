//! The client of the VMM's control socket.
//!
//! Each request has a connection of its own, so that there is none to repair. The calls block, on a thread of their own.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use isopod_proto::vmm::control_reply::Reply;
use isopod_proto::vmm::control_request::Request;
use isopod_proto::vmm::{
    AddDisk, AddFileSystem, Console, ControlReply, ControlRequest, Disk, Info, RemoveDisk, ResizeMemory, Segment, Stop,
    VmInfo,
};
use isopod_proto::{DiskId, ErrorKind, MAX_CONTROL_MESSAGE, decode_frame, encode_frame};
use prost::Message;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::{CONTROL_SOCKET, VmmError};

/// How long the VMM may take to answer.
const DEADLINE: Duration = Duration::from_secs(20);
/// SCM_MAX_FD of the kernel: most descriptors of one message.
const MAX_DESCRIPTORS: usize = 253;

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskPart {
    /// Which of the files it is in.
    pub file: usize,
    /// Where in the file the part begins; a multiple of 512.
    pub offset: u64,
    /// Its bytes; a multiple of 512.
    pub length: u64,
}

/// What a disk is made of: `parts` of `files`, one after the other.
#[derive(Debug)]
pub struct DiskContents {
    pub files: Vec<File>,
    pub parts: Vec<DiskPart>,
}

impl DiskContents {
    /// The first `length` bytes of a file.
    pub fn one(file: File, length: u64) -> Self {
        Self { files: vec![file], parts: vec![DiskPart { file: 0, offset: 0, length }] }
    }
}

/// Plugs a disk into the VM whose directory is `directory`.
pub async fn add_disk(directory: &Path, id: &DiskId, readonly: bool, disk: DiskContents) -> Result<(), VmmError> {
    let DiskContents { files, parts } = disk;
    if files.len() > MAX_DESCRIPTORS {
        let message = format!("{} files are more than the {MAX_DESCRIPTORS} a message can carry", files.len());
        return Err(VmmError::Refused { doing: "add a disk", kind: ErrorKind::InvalidArgument, message });
    }
    let segment = |part: DiskPart| Segment { fd: part.file as i32, offset: part.offset, length: part.length };
    let segments = parts.into_iter().map(segment).collect();
    let disk = Disk { id: id.as_str().to_owned(), readonly, segments };
    done("add a disk", directory, Request::AddDisk(AddDisk { disk: Some(disk) }), files).await
}

/// Takes a disk out of the VM. The guest must have let go of it.
pub async fn remove_disk(directory: &Path, id: &DiskId) -> Result<(), VmmError> {
    let request = Request::RemoveDisk(RemoveDisk { id: id.as_str().to_owned() });
    done("remove a disk", directory, request, Vec::new()).await
}

/// Plugs a file system into the VM whose server is at the other end of `socket`.
pub async fn add_file_system(directory: &Path, tag: &str, socket: File) -> Result<(), VmmError> {
    let request = Request::AddFileSystem(AddFileSystem { tag: tag.to_owned() });
    done("add a file system", directory, request, vec![socket]).await
}

/// The ids of the disks in the VM.
pub async fn disks(directory: &Path) -> Result<Vec<String>, VmmError> {
    Ok(info("list the disks", directory).await?.disk_ids)
}

/// How large a VM is, and can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmCapacity {
    /// vCPUs that it was brought up with.
    pub vcpus: u32,
    /// vCPUs that it can have. None is told of by a VMM of an earlier version.
    pub max_vcpus: u32,
    /// Bytes of memory that it was made with, and has at the least.
    pub min_memory_bytes: u64,
    /// Those that it has now.
    pub memory_bytes: u64,
    /// Those that it can have, in steps of 4 MiB above the least. None, as above.
    pub max_memory_bytes: u64,
}

/// How large the VM is, and can be.
pub async fn capacity(directory: &Path) -> Result<VmCapacity, VmmError> {
    let info = info("ask for the size", directory).await?;
    Ok(VmCapacity {
        vcpus: info.vcpus,
        max_vcpus: info.max_vcpus,
        min_memory_bytes: info.min_memory_bytes,
        memory_bytes: info.memory_bytes,
        max_memory_bytes: info.max_memory_bytes,
    })
}

/// Asks the guest to have so much memory, which [`capacity`] tells whether it has.
pub async fn resize_memory(directory: &Path, bytes: u64) -> Result<(), VmmError> {
    done("change the memory", directory, Request::ResizeMemory(ResizeMemory { bytes }), Vec::new()).await
}

async fn info(doing: &'static str, directory: &Path) -> Result<VmInfo, VmmError> {
    match ask(doing, directory, Request::Info(Info {}), Vec::new()).await? {
        Reply::Info(info) => Ok(info),
        other => Err(unexpected(doing, &other)),
    }
}

/// Stops the VM at once.
pub async fn stop(directory: &Path) -> Result<(), VmmError> {
    done("stop", directory, Request::Stop(Stop {}), Vec::new()).await
}

/// The newest bytes of the guest's console.
pub async fn console(directory: &Path) -> Result<Vec<u8>, VmmError> {
    match ask("read the console", directory, Request::Console(Console {}), Vec::new()).await? {
        Reply::Console(contents) => Ok(contents.bytes),
        other => Err(unexpected("read the console", &other)),
    }
}

async fn done(doing: &'static str, directory: &Path, request: Request, files: Vec<File>) -> Result<(), VmmError> {
    match ask(doing, directory, request, files).await? {
        Reply::Done(_) => Ok(()),
        other => Err(unexpected(doing, &other)),
    }
}

fn unexpected(doing: &'static str, reply: &Reply) -> VmmError {
    match reply {
        Reply::Error(error) => {
            let message = error.message.chars().take(1000).collect();
            VmmError::Refused { doing, kind: ErrorKind::from_code(error.kind), message }
        }
        Reply::Done(_) | Reply::Info(_) | Reply::Console(_) => {
            VmmError::Refused { doing, kind: ErrorKind::Internal, message: "it answered another question".to_owned() }
        }
    }
}

async fn ask(doing: &'static str, directory: &Path, request: Request, files: Vec<File>) -> Result<Reply, VmmError> {
    let path = directory.join(CONTROL_SOCKET);
    let socket = path.clone();
    let work = move || exchange(&socket, &ControlRequest { request: Some(request) }, &files, DEADLINE);
    let result: io::Result<ControlReply> =
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    let reply = result.map_err(|source| VmmError::Control { doing, path: path.clone(), source })?;
    let nothing = || VmmError::Control { doing, path, source: io::Error::other("the reply is empty") };
    reply.reply.ok_or_else(nothing)
}

/// Connects to the socket at `path`, sends `request` along with `files`, and returns the reply, for which each read and write may
/// take `deadline`.
pub(crate) fn exchange<Q: Message, A: Message + Default>(
    path: &Path,
    request: &Q,
    files: &[File],
    deadline: Duration,
) -> io::Result<A> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(deadline))?;
    stream.set_write_timeout(Some(deadline))?;
    let frame = encode_frame(request);
    let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let sent = sendmsg(&stream, &[IoSlice::new(&frame)], &mut ancillary, SendFlags::NOSIGNAL)?;
    stream.write_all(&frame[sent..])?;

    let mut reply = vec![0; 4];
    stream.read_exact(&mut reply)?;
    let length = u32::from_le_bytes([reply[0], reply[1], reply[2], reply[3]]) as usize;
    if length > MAX_CONTROL_MESSAGE {
        return Err(io::Error::other(format!("a reply of {length} bytes is too long")));
    }
    reply.resize(4 + length, 0);
    stream.read_exact(&mut reply[4..])?;
    let decoded = decode_frame(&reply, MAX_CONTROL_MESSAGE).map_err(io::Error::other)?;
    Ok(decoded.expect("the reply was read whole").0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use isopod_proto::vmm::ControlError;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    /// A VMM that answers one request with `reply`; gives the request and the number of descriptors it came with.
    fn fake_vmm(directory: &Path, reply: Reply) -> std::thread::JoinHandle<(ControlRequest, usize)> {
        let listener = UnixListener::bind(directory.join(CONTROL_SOCKET)).expect("bound");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut bytes = vec![0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let got = recvmsg(&stream, &mut [io::IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::empty())
                .expect("read");
            let mut count = 0;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    count += descriptors.count();
                }
            }
            let (request, _) =
                decode_frame(&bytes[..got.bytes], MAX_CONTROL_MESSAGE).expect("a frame").expect("whole at once");
            stream.write_all(&encode_frame(&ControlReply { reply: Some(reply) })).expect("written");
            (request, count)
        })
    }

    #[tokio::test]
    async fn a_disk_travels_with_its_descriptors() {
        let directory = tempfile::tempdir().expect("a directory");
        let vmm = fake_vmm(directory.path(), Reply::Done(isopod_proto::vmm::Done {}));
        let file = || tempfile::tempfile().expect("a file");
        let part = |file, offset| DiskPart { file, offset, length: 512 };
        let contents =
            DiskContents { files: vec![file(), file()], parts: vec![part(0, 0), part(1, 512), part(0, 512)] };
        let id = DiskId::parse("img-0123456789abcdef").expect("an id");
        add_disk(directory.path(), &id, true, contents).await.expect("done");
        let (request, descriptors) = vmm.join().expect("no panic");
        let Some(Request::AddDisk(AddDisk { disk: Some(disk) })) = request.request else { panic!("an AddDisk") };
        let named: Vec<_> = disk.segments.iter().map(|segment| (segment.fd, segment.offset)).collect();
        assert_eq!((descriptors, named), (2, vec![(0, 0), (1, 512), (0, 512)]));
        assert!(disk.readonly);
    }

    #[tokio::test]
    async fn a_refusal_keeps_its_kind() {
        let directory = tempfile::tempdir().expect("a directory");
        let error = ControlError { kind: ErrorKind::NotFound.code(), message: "no such disk".into() };
        let vmm = fake_vmm(directory.path(), Reply::Error(error));
        let id = DiskId::parse("x").expect("an id");
        let error = remove_disk(directory.path(), &id).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        vmm.join().expect("no panic");
    }

    #[tokio::test]
    async fn a_vmm_that_is_gone_is_unavailable() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(stop(directory.path()).await.expect_err("no socket").kind(), ErrorKind::Unavailable);
    }
}
