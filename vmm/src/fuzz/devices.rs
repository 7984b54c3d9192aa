//! The devices, each with another end that does what the input says.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;

use isopod_proto::DiskId;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::guest::{Host, Outside, drive};
use crate::devices::balloon::Balloon;
use crate::devices::block::{Block, Segment};
use crate::devices::fs::Fs;
use crate::devices::mem::{BLOCK_BYTES, Backing, Mem, MemControl};
use crate::devices::net::Net;
use crate::devices::rng::Rng;
use crate::devices::vsock::Vsock;

/// The guest's context id.
const CID: u64 = 9;
/// Most connections of the host that are kept.
const MAX_STREAMS: usize = 8;
/// Where the memory device's range is, and its blocks.
const MEM_START: u64 = 1 << 32;
const MEM_BLOCKS: u64 = 16;

struct Nobody;

impl Outside for Nobody {
    fn act(&mut self, _action: Host) {}
}

/// The balloon.
pub fn balloon(input: &[u8]) {
    drive(Box::new(Balloon::default()), &mut Nobody, input);
}

/// The entropy device.
pub fn rng(input: &[u8]) {
    drive(Box::new(Rng::new().expect("there are random numbers")), &mut Nobody, input);
}

/// A disk of three pieces, read-only or not as the first byte says.
pub fn block(input: &[u8]) {
    let Some((flags, input)) = input.split_first() else { return };
    thread_local! {
        static FILE: File = {
            let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory");
            ftruncate(&file, 64 << 10).expect("it grows");
            File::from(file)
        };
    }
    let segment = |offset, length| Segment { file: FILE.with(File::try_clone).expect("a descriptor"), offset, length };
    let segments = vec![segment(0, 4096), segment(8192, 512), segment(16384, 32768)];
    let disk = Block::new(DiskId::parse("fuzz").expect("an id"), flags & 1 != 0, segments).expect("a disk");
    drive(Box::new(disk), &mut Nobody, input);
}

/// A socket whose other end is the outside.
struct Peer(Option<OwnedFd>);

impl Outside for Peer {
    fn act(&mut self, action: Host) {
        let Some(socket) = &self.0 else { return };
        // A full socket, or one that the device has closed, takes nothing.
        match action {
            Host::Send(bytes) => drop(rustix::io::write(socket, &bytes)),
            Host::Receive => drop(rustix::io::read(socket, &mut [0; 65536][..])),
            Host::Open(_) => {}
            Host::Close => self.0 = None,
        }
    }
}

/// The network device; its tap is a socket that keeps packets apart, too.
pub fn net(input: &[u8]) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (tap, peer) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
    let device = Net::new(tap, [2, 0, 0, 0, 0, 1], 1500).expect("a device");
    drive(Box::new(device), &mut Peer(Some(peer)), input);
}

/// The other end of a file system device: a file server that answers with anything.
struct FileServer(Peer);

impl Outside for FileServer {
    fn act(&mut self, action: Host) {
        match action {
            // A reply to a small number, as long as it says.
            Host::Open(unique) => {
                let mut reply = vec![0; 16 + usize::from(unique) * 4];
                let length = reply.len() as u32;
                reply[..4].copy_from_slice(&length.to_le_bytes());
                reply[8] = unique % 8;
                self.0.act(Host::Send(reply));
            }
            other => self.0.act(other),
        }
    }

    fn mend(&mut self, bytes: &mut [u8], total: usize) {
        if let Some(length) = bytes.first_chunk_mut::<4>() {
            *length = (total as u32).to_le_bytes();
        }
        if let Some(unique) = bytes.get_mut(8..16) {
            unique.copy_from_slice(&u64::from(unique[0] % 8).to_le_bytes());
        }
    }
}

/// The file system device.
pub fn file_system(input: &[u8]) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (socket, peer) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("sockets");
    let device = Fs::new("fuzz", socket).expect("a device");
    drive(Box::new(device), &mut FileServer(Peer(Some(peer))), input);
}

/// Memory that may be given once, and taken when it was.
#[derive(Clone, Default)]
struct Given(Arc<Mutex<[bool; MEM_BLOCKS as usize]>>);

impl Given {
    fn set(&self, offset: u64, length: u64, given: bool) -> io::Result<()> {
        assert!(offset.is_multiple_of(BLOCK_BYTES) && length.is_multiple_of(BLOCK_BYTES) && length > 0);
        let range = (offset / BLOCK_BYTES) as usize..((offset + length) / BLOCK_BYTES) as usize;
        for block in &mut self.0.lock()[range] {
            assert_ne!(std::mem::replace(block, given), given);
        }
        Ok(())
    }
}

impl Backing for Given {
    fn give(&self, offset: u64, length: u64) -> io::Result<()> {
        self.set(offset, length, true)
    }

    fn take(&self, offset: u64, length: u64) -> io::Result<()> {
        self.set(offset, length, false)
    }
}

/// A daemon that changes its mind about the guest's size.
struct Daemon {
    control: MemControl,
    given: Given,
}

impl Outside for Daemon {
    fn act(&mut self, action: Host) {
        if let Host::Open(blocks) = action {
            // More than there are is refused.
            let _ = self.control.request(u64::from(blocks) * BLOCK_BYTES);
        }
        let given = self.given.0.lock().iter().filter(|given| **given).count() as u64;
        assert_eq!(self.control.plugged_bytes(), given * BLOCK_BYTES);
    }

    /// Makes it a request for a few blocks, most of which there are.
    fn mend(&mut self, bytes: &mut [u8], _total: usize) {
        let Some(request) = bytes.first_chunk_mut::<18>() else { return };
        (request[0], request[1]) = (request[0] % 5, 0);
        let address = MEM_START + u64::from(request[8] % (MEM_BLOCKS as u8 + 2)) * BLOCK_BYTES;
        request[8..16].copy_from_slice(&address.to_le_bytes());
        (request[16], request[17]) = (request[16] % 5, 0);
    }
}

/// The memory device.
pub fn mem(input: &[u8]) {
    let given = Given::default();
    let device = Mem::new(MEM_START, MEM_BLOCKS * BLOCK_BYTES, Box::new(given.clone()));
    let mut daemon = Daemon { control: device.control(), given };
    drive(Box::new(device), &mut daemon, input);
    daemon.act(Host::Close);
}

/// Programs of the host that connect to a guest, or wait for it to connect.
struct Programs {
    address: SocketAddr,
    streams: Vec<UnixStream>,
}

impl Programs {
    fn open(&mut self, line: &str) {
        if self.streams.len() < MAX_STREAMS
            && let Ok(mut stream) = UnixStream::connect_addr(&self.address)
        {
            stream.set_nonblocking(true).expect("it is a socket");
            let _ = stream.write(line.as_bytes());
            self.streams.push(stream);
        }
    }
}

impl Outside for Programs {
    fn act(&mut self, action: Host) {
        match action {
            Host::Open(port) if port & 1 == 0 => self.open(&format!("ACCEPT {}\n", port % 8)),
            Host::Open(port) => self.open(&format!("CONNECT {}\n", port % 8)),
            Host::Send(bytes) => {
                if self.streams.is_empty() {
                    self.open("");
                }
                if let Some(mut stream) = self.streams.last() {
                    let _ = stream.write(&bytes);
                }
            }
            Host::Receive => {
                for mut stream in &self.streams {
                    let _ = stream.read(&mut [0; 65536]);
                }
            }
            Host::Close => {
                if !self.streams.is_empty() {
                    self.streams.remove(0);
                }
            }
        }
    }

    /// Makes it a packet of the guest between ports that programs use, of the right length.
    fn mend(&mut self, bytes: &mut [u8], total: usize) {
        let Some(header) = bytes.first_chunk_mut::<44>() else { return };
        header[..8].copy_from_slice(&CID.to_le_bytes());
        header[8..16].copy_from_slice(&2u64.to_le_bytes());
        let port = |byte: u8| if byte & 0x40 == 0 { u32::from(byte % 8) } else { (1 << 30) + u32::from(byte % 8) };
        let (source, destination) = (port(header[16]), port(header[20]));
        header[16..20].copy_from_slice(&source.to_le_bytes());
        header[20..24].copy_from_slice(&destination.to_le_bytes());
        header[24..28].copy_from_slice(&(total.saturating_sub(44) as u32).to_le_bytes());
        header[28..30].copy_from_slice(&1u16.to_le_bytes());
        header[30] %= 8;
        header[31] = 0;
    }
}

/// The socket device.
pub fn vsock(input: &[u8]) {
    thread_local! {
        static LISTENER: (UnixListener, SocketAddr) = {
            let name = format!("isopod-fuzz-{}", std::process::id());
            let address = SocketAddr::from_abstract_name(name).expect("a name");
            (UnixListener::bind_addr(&address).expect("nobody else has the name"), address)
        };
    }
    let (listener, address) =
        LISTENER.with(|(listener, address)| (listener.try_clone().expect("a descriptor"), address.clone()));
    let device = Vsock::new(listener, CID).expect("a device");
    drive(Box::new(device), &mut Programs { address, streams: vec![] }, input);
    // Those that were not accepted belong to no other input.
    LISTENER.with(|(listener, _)| while listener.accept().is_ok() {});
}
