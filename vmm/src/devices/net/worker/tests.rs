use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::queue::RING_FEATURES;
use crate::devices::testing::{BUFFERS, Driver, activate, memory};
use crate::devices::worker::{FaultLog, Worker};
use crate::virtio::{ActivateError, Activation, VirtioDevice};

/// The device on a socket that keeps packets apart, as a tap does.
struct TestNet {
    tap: OwnedFd,
    mergeable: bool,
    worker: Option<Worker>,
}

impl VirtioDevice for TestNet {
    fn device_type(&self) -> u16 {
        1
    }
    fn name(&self) -> String {
        "net test".to_owned()
    }
    fn features(&self) -> u64 {
        RING_FEATURES
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (queues, launch) = DeviceQueue::take_over(activation);
        let worker = NetWorker::new(queues, self.tap.try_clone().unwrap(), self.mergeable).unwrap();
        self.worker = Some(launch.worker("net test", FaultLog::new(), worker).unwrap());
        Ok(())
    }
    fn reset(&mut self) {
        self.worker = None;
    }
}

struct Setup {
    _device: TestNet,
    rx: Driver,
    tx: Driver,
    wire: OwnedFd,
}

fn start(mergeable: bool) -> Setup {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, wire) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let mut device = TestNet { tap, mergeable, worker: None };
    let mut drivers = activate(&mut device, &memory(), RING_FEATURES);
    Setup { _device: device, tx: drivers.remove(1), rx: drivers.remove(0), wire }
}

/// A packet of `length` bytes, its header included, whose bytes tell their places.
fn packet(length: usize) -> Vec<u8> {
    (0..length).map(|place| if place < VNET_HEADER_BYTES { 0 } else { place as u8 }).collect()
}

fn read_wire(wire: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; MAX_PACKET];
    match rustix::io::read(wire, &mut bytes[..]) {
        Ok(length) => bytes.truncate(length),
        Err(_) => return None,
    }
    Some(bytes)
}

#[test]
fn the_guests_packets_go_out_whole() {
    let mut setup = start(true);
    for length in [26, 60, 1514 + 12, 65535] {
        let sent = packet(length);
        setup.tx.memory.write_slice(&sent, GuestAddress(BUFFERS)).unwrap();
        // The header alone, and the frame in two pieces.
        let middle = 12 + (length as u32 - 12) / 2;
        let pieces = [
            (BUFFERS, 12, false),
            (BUFFERS + 12, middle - 12, false),
            (BUFFERS + u64::from(middle), length as u32 - middle, false),
        ];
        assert_eq!(setup.tx.request(&pieces), 0);
        assert_eq!(read_wire(&setup.wire).unwrap(), sent);
    }
}

#[test]
fn packets_that_are_none_are_dropped() {
    let mut setup = start(true);
    for length in [0, 1, 11, 12, 25, MAX_PACKET as u32 + 1, 1 << 20] {
        assert_eq!(setup.tx.request(&[(BUFFERS, length, false)]), 0);
    }
    assert_eq!(setup.tx.request(&[(BUFFERS, 100, true)]), 0);
    assert_eq!(read_wire(&setup.wire), None);
}

#[test]
fn a_packet_takes_as_many_buffers_as_it_needs() {
    let mut setup = start(true);
    let heads: Vec<u16> = (0..8).map(|index| setup.rx.add(&[(BUFFERS + 1000 * index, 1000, true)]).unwrap()).collect();
    setup.rx.notify();
    rustix::io::write(&setup.wire, &packet(2500)).unwrap();
    rustix::io::write(&setup.wire, &packet(100)).unwrap();
    let used: Vec<_> = (0..4).map(|_| setup.rx.wait_used()).collect();
    assert_eq!(used, [(heads[0], 1000), (heads[1], 1000), (heads[2], 500), (heads[3], 100)]);
    let mut expected = packet(2500);
    expected[NUM_BUFFERS].copy_from_slice(&[3, 0]);
    assert_eq!(setup.rx.bytes(BUFFERS, 2500), expected);
    let mut expected = packet(100);
    expected[NUM_BUFFERS].copy_from_slice(&[1, 0]);
    assert_eq!(setup.rx.bytes(BUFFERS + 3000, 100), expected);
}

#[test]
fn a_packet_waits_for_buffers_and_none_is_lost_or_cut() {
    let mut setup = start(true);
    for length in [3000, 50, 2000] {
        rustix::io::write(&setup.wire, &packet(length)).unwrap();
    }
    for index in 0..10u64 {
        setup.rx.add(&[(BUFFERS + 700 * index, 700, true)]).unwrap();
        setup.rx.notify();
    }
    let lengths: Vec<u32> = (0..9).map(|_| setup.rx.wait_used().1).collect();
    assert_eq!(lengths, [700, 700, 700, 700, 200, 50, 700, 700, 600]);
    assert_eq!(setup.rx.bytes(BUFFERS + 5 * 700 + 12, 38), packet(50)[12..]);
}

#[test]
fn a_packet_that_does_not_fit_one_buffer_is_dropped_without_merging() {
    let mut setup = start(false);
    setup.rx.add(&[(BUFFERS, 12, true), (BUFFERS + 0x1000, 500, true)]).unwrap();
    setup.rx.notify();
    rustix::io::write(&setup.wire, &packet(513)).unwrap();
    rustix::io::write(&setup.wire, &packet(512)).unwrap();
    assert_eq!(setup.rx.wait_used().1, 512);
    assert_eq!(setup.rx.bytes(BUFFERS + 0x1000, 500), packet(512)[12..]);
}

#[test]
fn buffers_too_small_for_any_packet_stop_neither_device_nor_transmission() {
    let mut setup = start(true);
    for _ in 0..64 {
        setup.rx.add(&[(BUFFERS, 1, true)]).unwrap();
    }
    setup.rx.notify();
    rustix::io::write(&setup.wire, &packet(1000)).unwrap();
    assert_eq!(setup.tx.request(&[(BUFFERS, 100, false)]), 0);
    assert_eq!(read_wire(&setup.wire).unwrap().len(), 100);
    // One that fits into all of them together still comes.
    rustix::io::write(&setup.wire, &packet(64)).unwrap();
    let used: Vec<u32> = (0..64).map(|_| setup.rx.wait_used().1).collect();
    assert_eq!(used, [1; 64]);
}

#[test]
fn a_tap_that_is_gone_stops_the_device() {
    let setup = start(true);
    rustix::net::shutdown(&setup.wire, rustix::net::Shutdown::Both).unwrap();
    assert!(setup.rx.needs_reset());
}
