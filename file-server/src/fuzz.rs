//! Entry point for the fuzzer (`fuzz/`): FUSE requests of a guest, over a share in memory.

use std::fs;
use std::path::{Path, PathBuf};

use arbitrary::{Arbitrary, Unstructured};
use rustix::fs::{Mode, OFlags};

use crate::fuse::{Header, ROOT, Reply, opcode};
use crate::server::Server;

/// Bytes that one request may allocate: memory is what the share is made of.
const MAX_ALLOCATION: u64 = 64 << 10;

/// A request. Numbers of files and handles are small, as those that the server gives are.
#[derive(Debug, Arbitrary)]
struct Request {
    opcode: u8,
    node: u8,
    uid: u8,
    body: Body,
}

#[derive(Debug, Arbitrary)]
enum Body {
    /// As it is.
    Bytes(Vec<u8>),
    /// Numbers, and then a name or data.
    Fields { handle: u8, numbers: [u16; 6], name: u8 },
    /// A name alone.
    Name(u8),
    /// Two names.
    Names(u8, u8),
    /// Bytes before a name.
    Prefixed { length: u8, numbers: [u16; 4], name: u8 },
}

fn name(number: u8) -> Vec<u8> {
    const NAMES: [&[u8]; 12] =
        [b"s", b"file", b"dir", b"link", b"new", b"..", b".", b"", b"a/b", b"user.x", b"security.capability", b"fifo"];
    [NAMES[usize::from(number) % NAMES.len()], b"\0"].concat()
}

impl Body {
    fn bytes(self) -> Vec<u8> {
        let words = |numbers: &[u16]| numbers.iter().flat_map(|number| u32::from(*number).to_le_bytes()).collect();
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Fields { handle, numbers, name: last } => {
                [u64::from(handle).to_le_bytes().to_vec(), words(&numbers), name(last)].concat()
            }
            Self::Name(one) => name(one),
            Self::Names(one, other) => [name(one), name(other)].concat(),
            Self::Prefixed { length, numbers, name: last } => {
                let mut bytes: Vec<u8> = words(&numbers);
                bytes.resize(usize::from(length % 5) * 8, 0);
                [bytes, name(last)].concat()
            }
        }
    }
}

struct World(PathBuf);

impl World {
    /// A root with a share `s` that has something of each kind, beside a file that no guest may reach.
    fn new() -> Self {
        let path = PathBuf::from(format!("/dev/shm/isopod-fuzz-files-{}", std::process::id()));
        let world = Self(path);
        let _ = fs::remove_dir_all(&world.0);
        let share = world.0.join("root/s");
        fs::create_dir_all(share.join("dir")).expect("made");
        fs::write(share.join("file"), "contents").expect("written");
        std::os::unix::fs::symlink("../../secret", share.join("link")).expect("made");
        fs::write(world.0.join("secret"), "secret").expect("written");
        world
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn open(path: &Path) -> std::os::fd::OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("it is there")
}

/// A session of requests.
pub fn requests(input: &[u8]) {
    let world = World::new();
    let server = Server::new(open(&world.0.join("root")), open(Path::new("/proc/self/fd")));
    let mut input = Unstructured::new(input);
    let mut reply = Reply::default();
    // What every session begins with: the share is file 2.
    answer(&server, opcode::LOOKUP, ROOT, 0, b"s\0", &mut reply);
    let mut number = 0;
    while !input.is_empty() && number < 64 {
        let Ok(request) = Request::arbitrary(&mut input) else { break };
        let Request { opcode, node, uid, body } = request;
        let (opcode, mut body) = (u32::from(opcode % 50), body.bytes());
        bound(opcode, &mut body);
        answer(&server, opcode, u64::from(node % 16), uid.into(), &body, &mut reply);
        number += 1;
    }
    let secret = fs::read(world.0.join("secret")).expect("it is still there");
    assert_eq!(secret, b"secret");
    assert_eq!(fs::read_dir(&world.0).expect("it is there").count(), 2, "something was made outside the shares");
}

/// Makes an allocation one that is had at once.
fn bound(opcode: u32, body: &mut [u8]) {
    if opcode == opcode::FALLOCATE
        && let Some(range) = body.get_mut(8..24)
    {
        for field in range.chunks_exact_mut(8) {
            let value = u64::from_le_bytes(field.try_into().expect("8 bytes")) % MAX_ALLOCATION;
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn answer(server: &Server, opcode: u32, node: u64, uid: u32, body: &[u8], reply: &mut Reply) {
    let mut bytes = [0; crate::fuse::REQUEST_HEADER];
    let length = bytes.len() + body.len();
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
    bytes[8..16].copy_from_slice(&7u64.to_le_bytes());
    bytes[16..24].copy_from_slice(&node.to_le_bytes());
    bytes[24..28].copy_from_slice(&uid.to_le_bytes());
    let header = Header::parse(&bytes).expect("a header");
    let Some(answer) = server.answer(header, body, reply) else { return };
    assert_eq!(answer.len(), u32::from_le_bytes(answer[..4].try_into().expect("4 bytes")) as usize);
    assert!(answer.len() <= isopod_proto::MAX_FUSE_MESSAGE);
    assert_eq!(answer[8], 7);
}
