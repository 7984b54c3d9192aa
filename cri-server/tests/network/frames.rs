//! Ethernet frames by hand, and the tap that they go through.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use isopod_cri_server::network::pod::Mac;

/// Bytes before each frame: struct virtio_net_hdr_v1.
const HEADER: usize = 12;
const PATIENCE: Duration = Duration::from_secs(10);

/// A pod's open tap, as its VMM has it.
pub struct Tap(pub OwnedFd);

impl Tap {
    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) {
        let message = [vec![0; HEADER], frame.to_vec()].concat();
        assert_eq!(rustix::io::write(&self.0, &message).expect("sent"), message.len());
    }

    /// The next frame, if there is one.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut buffer = [0; 4096];
        let length = rustix::io::read(&self.0, &mut buffer).ok()?;
        Some(buffer[HEADER..length].to_vec())
    }

    /// Sends a frame again and again until `other` has got it.
    pub fn send_until_received(&self, frame: &[u8], other: &Self) {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            self.send(frame);
            std::thread::sleep(Duration::from_millis(20));
            while let Some(received) = other.receive() {
                if received == frame {
                    return;
                }
            }
        }
        panic!("nothing goes through the bridge");
    }

    /// What comes before `end`.
    pub fn received_before(&self, end: &[u8]) -> Vec<Vec<u8>> {
        let (mut frames, start) = (Vec::new(), Instant::now());
        while start.elapsed() < PATIENCE {
            match self.receive() {
                Some(frame) if frame == end => return frames,
                Some(frame) => frames.push(frame),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        panic!("the last frame did not come; before it came {frames:02x?}");
    }
}

/// A frame, at least as long as the shortest.
pub fn ethernet(from: Mac, to: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &kind.to_be_bytes(), payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// An ARP request of this sender.
pub fn arp(sender: Mac, address: Ipv4Addr) -> Vec<u8> {
    let target = Ipv4Addr::new(10, 77, 0, 6).octets();
    [&[0, 1, 8, 0, 6, 4, 0, 1][..], &sender.0, &address.octets(), &[0; 6], &target].concat()
}

/// An IPv4 packet with an empty UDP datagram.
pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut header = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let sum: u32 = header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    [&header[..], &[0, 9, 0, 9, 0, 8, 0, 0]].concat()
}

/// An IPv6 packet.
pub fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("short").to_be_bytes();
    [&[0x60, 0, 0, 0, length[0], length[1], next, 255][..], &from.octets(), &to.octets(), payload].concat()
}

/// A neighbour advertisement for this address.
pub fn advertisement(target: Ipv6Addr) -> Vec<u8> {
    [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets()].concat()
}

/// A neighbour solicitation for this address.
pub fn solicitation(target: Ipv6Addr) -> Vec<u8> {
    [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat()
}
