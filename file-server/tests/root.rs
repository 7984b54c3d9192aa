//! The whole program: broker, jail, shares, as the daemon and a guest's VMM would use them. Needs root.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::CommandFdExt;
use isopod_proto::files::file_server_reply::Reply;
use isopod_proto::files::file_server_request::Request;
use isopod_proto::files::{AddShare, FileServerReply, FileServerRequest, RemoveShares};
use isopod_proto::{MAX_CONTROL_MESSAGE, decode_frame, encode_frame};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const MKDIR: u32 = 9;
const RENAME2: u32 = 45;
const ROOT: u64 = 1;

struct FileServer {
    process: Child,
    socket: std::path::PathBuf,
    fuse: UnixStream,
    directory: tempfile::TempDir,
}

impl FileServer {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("fs.sock");
        let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
        let (fuse, theirs) = UnixStream::pair().unwrap();
        fuse.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let theirs = OwnedFd::from(theirs);
        let mut command = Command::new(env!("CARGO_BIN_EXE_isopod-fs"));
        command.args(["broker", &listener.as_raw_fd().to_string(), &theirs.as_raw_fd().to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).preserved_fds(vec![listener, theirs]);
        let mut process = command.spawn().unwrap();
        drop(command);
        process.stdin.take().unwrap().write_all(b"\n").unwrap();
        process.stdout.as_mut().unwrap().read_exact(&mut [0]).expect("ready");
        Self { process, socket, fuse, directory }
    }

    fn request(&self, request: Request, tree: Option<&OwnedFd>) -> Result<(), String> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        let frame = encode_frame(&FileServerRequest { request: Some(request) });
        let descriptors: Vec<_> = tree.iter().map(|tree| tree.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        }
        sendmsg(&stream, &[IoSlice::new(&frame)], &mut ancillary, SendFlags::empty()).unwrap();
        let mut reply = vec![];
        stream.read_to_end(&mut reply).unwrap();
        let (reply, _) = decode_frame::<FileServerReply>(&reply, MAX_CONTROL_MESSAGE).unwrap().unwrap();
        match reply.reply.unwrap() {
            Reply::Done(_) => Ok(()),
            Reply::Error(error) => Err(error.message),
        }
    }

    fn share(&self, path: &Path, share: AddShare) {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = rustix::mount::open_tree(CWD, path, flags).unwrap();
        self.request(Request::AddShare(share), Some(&tree)).unwrap();
    }

    fn remove(&self, prefix: &str) {
        self.request(Request::RemoveShares(RemoveShares { prefix: prefix.into() }), None).unwrap();
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut message = vec![0; 40];
        message[..4].copy_from_slice(&(40 + body.len() as u32).to_le_bytes());
        message[4..8].copy_from_slice(&opcode.to_le_bytes());
        message[16..24].copy_from_slice(&node.to_le_bytes());
        message.extend_from_slice(body);
        self.fuse.write_all(&message).unwrap();
        let mut header = [0; 16];
        self.fuse.read_exact(&mut header).unwrap();
        let mut body = vec![0; u32::from_le_bytes(header[..4].try_into().unwrap()) as usize - 16];
        self.fuse.read_exact(&mut body).unwrap();
        match i32::from_le_bytes(header[4..8].try_into().unwrap()) {
            0 => Ok(body),
            error => Err(-error),
        }
    }

    fn look_up(&mut self, path: &str) -> Result<u64, i32> {
        path.split('/').try_fold(ROOT, |node, name| {
            let entry = self.ask(LOOKUP, node, format!("{name}\0").as_bytes())?;
            Ok(u64::from_le_bytes(entry[..8].try_into().unwrap()))
        })
    }

    fn make_directory(&mut self, parent: &str, name: &str) -> Result<Vec<u8>, i32> {
        let parent = self.look_up(parent)?;
        self.ask(MKDIR, parent, &[&0o755u32.to_le_bytes()[..], &[0; 4], name.as_bytes(), b"\0"].concat())
    }

    fn rename(&mut self, from: &str, name: &str, to: &str) -> Result<(), i32> {
        let (from, to) = (self.look_up(from)?, self.look_up(to)?);
        let names = [name.as_bytes(), b"\0", name.as_bytes(), b"\0"].concat();
        self.ask(RENAME2, from, &[&to.to_le_bytes()[..], &[0; 8], &names].concat()).map(drop)
    }

    /// The server process: the broker's one child.
    fn server(&self) -> i32 {
        let pid = self.process.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.trim().parse().unwrap()
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A directory that is a mount of its own, whose mounts spread; with it in this test's mount namespace alone.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        rustix::mount::mount("none", directory.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        rustix::mount::mount_change(directory.path(), MountPropagationFlags::SHARED).unwrap();
        fs::create_dir(directory.path().join("sub")).unwrap();
        fs::create_dir(directory.path().join("later")).unwrap();
        Self(directory)
    }

    fn mount(&self, name: &str) {
        let path = self.0.path().join(name);
        rustix::mount::mount("none", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(path.join("inside"), "").unwrap();
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

fn named(name: &str) -> AddShare {
    AddShare { name: name.into(), ..AddShare::default() }
}

#[test]
fn root_shares_come_and_go() {
    let mut server = FileServer::start();
    let data = server.directory.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "x").unwrap();
    server.share(&data, named("a.0"));
    server.share(&data.join("file"), named("a.1"));
    server.share(&data, named("b.0"));
    assert!(server.look_up("a.0/file").is_ok());
    // A file has no names in it.
    assert!(server.look_up("a.1").is_ok());
    assert_eq!(server.look_up("a.1/x"), Err(libc::ENOTDIR));
    server.make_directory("a.0", "made").unwrap();
    assert!(data.join("made").is_dir());
    server.rename("a.0", "file", "a.0/made").unwrap();
    server.rename("a.0/made", "file", "a.0").unwrap();
    assert_eq!(server.rename("a.0", "file", "b.0"), Err(libc::EXDEV));
    let known = server.look_up("a.0/file").unwrap();
    let other = server.look_up("b.0/file").unwrap();
    assert_ne!(known, other);
    server.remove("a.");
    assert_eq!(server.look_up("a.0"), Err(libc::ENOENT));
    assert_eq!(server.look_up("a.1"), Err(libc::ENOENT));
    assert_eq!(server.ask(GETATTR, known, &[0; 16]), Err(libc::ESTALE));
    assert!(server.ask(GETATTR, other, &[0; 16]).is_ok());
    let message = server.request(Request::AddShare(named("b.0")), None).unwrap_err();
    assert!(message.contains("tree"), "{message}");
}

#[test]
fn root_read_only_is_the_top_mount_or_all() {
    let mut server = FileServer::start();
    let tree = Tree::new();
    tree.mount("sub");
    server.share(tree.0.path(), AddShare { readonly: true, ..named("ro") });
    server.share(tree.0.path(), AddShare { readonly: true, recursive_readonly: true, ..named("rro") });
    server.share(tree.0.path(), named("rw"));
    assert_eq!(server.make_directory("ro", "x"), Err(libc::EROFS));
    assert!(server.make_directory("ro/sub", "ro").is_ok());
    assert_eq!(server.make_directory("rro", "x"), Err(libc::EROFS));
    assert_eq!(server.make_directory("rro/sub", "x"), Err(libc::EROFS));
    assert!(server.make_directory("rw", "rw").is_ok());
    // The same file through both.
    assert_eq!(server.make_directory("ro/rw", "x"), Err(libc::EROFS));
    // The host's own mount is as it was.
    fs::create_dir(tree.0.path().join("host")).unwrap();
}

#[test]
fn root_later_mounts_of_the_host_show_where_they_are_followed() {
    let mut server = FileServer::start();
    let tree = Tree::new();
    server.share(tree.0.path(), AddShare { follow_host: true, ..named("follows") });
    server.share(tree.0.path(), named("private"));
    tree.mount("later");
    assert!(server.look_up("follows/later/inside").is_ok());
    assert_eq!(server.look_up("private/later/inside"), Err(libc::ENOENT));
    // Lazily: the guest still knows a file on it.
    rustix::mount::unmount(tree.0.path().join("later"), UnmountFlags::DETACH).unwrap();
    assert_eq!(server.look_up("follows/later/inside"), Err(libc::ENOENT));
}

#[test]
fn root_the_server_is_in_a_jail() {
    let server = FileServer::start();
    let pid = server.server();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, SETFCAP 31
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0x8000_001b, "{set}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("NSpid").split_whitespace().last(), Some("1"));
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(link(&pid.to_string()), link("self"), "{namespace}");
    }
    // Nothing is in its root, and nothing else is mounted.
    for pid in [pid, server.process.id() as i32] {
        assert_eq!(fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap().lines().count(), 1);
    }
}

#[test]
fn root_it_ends_with_the_vm() {
    let mut server = FileServer::start();
    let pid = server.server();
    let (gone, _) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut server.fuse, gone));
    let status = server.process.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}
