//! Starting the real `isopod-vmm` on a guest of a few instructions, and talking to it.

use std::fs::File;
use std::io::{IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use isopod_proto::vmm::control_reply::Reply;
use isopod_proto::vmm::control_request::Request;
use isopod_proto::vmm::{
    AddDisk, AddFileSystem, ControlReply, ControlRequest, Disk, RemoveDisk, ResizeMemory, Segment, User, VmConfig,
    VmExit,
};
use isopod_proto::{decode_frame, encode_frame};
use prost::Message;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};

const DEADLINE: Duration = Duration::from_secs(30);
/// Where the guests are linked to.
const ENTRY: u64 = 0x10_0000;

/// Whether `/dev/kvm` opens, and the VMM can make its jail, as only root can. Where it must (`CI=true`), the test fails without it;
/// elsewhere the skip is printed.
pub fn kvm_is_there() -> bool {
    let root = if rustix::process::geteuid().is_root() { Ok(()) } else { Err(std::io::Error::other("not as root")) };
    let opened = root.and_then(|()| File::options().read(true).write(true).open("/dev/kvm"));
    if let Err(error) = &opened {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "/dev/kvm cannot be opened: {error}");
        println!("skipped: /dev/kvm cannot be opened: {error}");
    }
    opened.is_ok()
}

/// What to run.
pub struct Guest {
    /// 64-bit machine code.
    pub code: Vec<u8>,
    pub vcpus: u32,
    pub max_vcpus: u32,
    pub memory: u64,
    pub max_memory: u64,
    /// Instead of an ELF file of the code.
    pub kernel: Option<Vec<u8>>,
}

impl Default for Guest {
    fn default() -> Self {
        Self { code: vec![0xf4], vcpus: 1, max_vcpus: 0, memory: 32 << 20, max_memory: 0, kernel: None }
    }
}

/// A running VM, killed on drop.
pub struct Vm {
    child: Child,
    record: File,
    folder: tempfile::TempDir,
    status: Option<i32>,
}

/// An ELF file with one segment of `code` at [`ENTRY`] (System V ABI, chapter 4).
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    for address in [ENTRY, 64, 0] {
        file.extend(address.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    file.extend(7u32.to_le_bytes());
    for field in [120, ENTRY, ENTRY, code.len() as u64, code.len() as u64, 1] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    file
}

fn file_of(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(content).expect("room");
    file
}

impl Vm {
    /// Starts `isopod-vmm` as the daemon does.
    pub fn start(guest: &Guest) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let record = tempfile::tempfile().expect("a temporary file");
        let mut inherited: Vec<OwnedFd> = vec![];
        let mut inherit = |fd: OwnedFd| {
            fcntl_setfd(&fd, FdFlags::empty()).expect("open");
            let number = fd.as_raw_fd();
            inherited.push(fd);
            number
        };
        let listener = |name| UnixListener::bind(folder.path().join(name)).expect("a socket");
        let kernel = guest.kernel.clone().unwrap_or_else(|| elf(&guest.code));
        let config = VmConfig {
            vcpus: guest.vcpus,
            max_vcpus: guest.max_vcpus,
            memory_bytes: guest.memory,
            max_memory_bytes: guest.max_memory,
            kernel_fd: inherit(file_of(&kernel).into()),
            initramfs_fd: inherit(file_of(b"nothing").into()),
            control_fd: inherit(listener("control").into()),
            vsock_fd: inherit(listener("vsock").into()),
            guest_cid: 3,
            user: Some(User { uid: 0x7000_0000, gid: 0x7000_0000 }),
            exit_fd: inherit(record.try_clone().expect("descriptors are left").into()),
            ..VmConfig::default()
        };
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let fd = inherit(reader.into()).to_string();
        let child =
            Command::new(env!("CARGO_BIN_EXE_isopod-vmm")).args(["--config-fd", &fd]).spawn().expect("it starts");
        writer.write_all(&config.encode_to_vec()).expect("it reads");
        Self { child, record, folder, status: None }
    }

    /// Waits for the end and reads the exit record.
    pub fn exit(&mut self) -> VmExit {
        let deadline = Instant::now() + DEADLINE;
        let status = loop {
            match self.child.try_wait().expect("it is our child") {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "it does not end"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.status = status.code();
        let mut bytes = vec![];
        self.record.rewind().expect("a file");
        self.record.read_to_end(&mut bytes).expect("a file");
        decode_frame(&bytes, 1 << 20).expect("a valid record").expect("a whole record").0
    }

    /// The process's exit status, after [`Vm::exit`].
    pub fn status(&self) -> Option<i32> {
        self.status
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).expect("it runs");
    }

    /// Waits for `condition`.
    pub fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "it does not happen");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends a request and returns its reply.
    pub fn call(&self, request: Request) -> Reply {
        self.call_with(request, 0)
    }

    /// The same, with `files` descriptors of 4096-byte files.
    fn call_with(&self, request: Request, files: usize) -> Reply {
        let mut stream = UnixStream::connect(self.folder.path().join("control")).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("settable");
        let frame = encode_frame(&ControlRequest { request: Some(request) });
        let files: Vec<File> = (0..files).map(|_| file_of(&[0; 4096])).collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&stream, &[IoSlice::new(&frame)], &mut ancillary, SendFlags::empty()).expect("it reads");
        let mut bytes = vec![];
        loop {
            if let Some((reply, _)) = decode_frame::<ControlReply>(&bytes, 1 << 20).expect("a valid reply") {
                return reply.reply.expect("not empty");
            }
            let mut chunk = [0; 4096];
            let read = stream.read(&mut chunk).expect("a reply in time");
            assert_ne!(read, 0, "the connection was closed without a reply");
            bytes.extend_from_slice(&chunk[..read]);
        }
    }

    /// Adds a disk of `segments` (descriptor, offset, length) in `files` files. The error is its kind and message.
    pub fn add_disk(&self, id: &str, segments: &[(i32, u64, u64)], files: usize) -> Result<(), (u32, String)> {
        let segments = segments.iter().map(|&(fd, offset, length)| Segment { fd, offset, length }).collect();
        let disk = Disk { id: id.into(), readonly: true, segments };
        done(self.call_with(Request::AddDisk(AddDisk { disk: Some(disk) }), files))
    }

    /// Adds a file system with a file in place of a socket. The error is its kind and message.
    pub fn add_file_system(&self, tag: &str) -> Result<(), (u32, String)> {
        done(self.call_with(Request::AddFileSystem(AddFileSystem { tag: tag.into() }), 1))
    }

    /// Asks for another size.
    pub fn resize_memory(&self, bytes: u64) -> Result<(), (u32, String)> {
        done(self.call(Request::ResizeMemory(ResizeMemory { bytes })))
    }

    /// Removes a disk.
    pub fn remove_disk(&self, id: &str) -> Result<(), (u32, String)> {
        done(self.call(Request::RemoveDisk(RemoveDisk { id: id.into() })))
    }
}

fn done(reply: Reply) -> Result<(), (u32, String)> {
    match reply {
        Reply::Done(_) => Ok(()),
        Reply::Error(error) => Err((error.kind, error.message)),
        other => panic!("{other:?}"),
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
