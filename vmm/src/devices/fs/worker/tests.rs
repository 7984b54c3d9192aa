use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::super::Fs;
use super::super::message::REPLY_HEADER;
use crate::devices::testing::{BUFFERS, Driver, activate, memory};
use crate::virtio::VirtioDevice;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const REQUEST: u64 = BUFFERS;
const REPLY: u64 = BUFFERS + 0x10000;

fn device() -> (Fs, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (Fs::new("shares", ours.into()).unwrap(), theirs)
}

fn queues(device: &mut Fs) -> (Driver, Driver) {
    let mut drivers = activate(device, &memory(), 0);
    let request = drivers.pop().unwrap();
    (drivers.pop().unwrap(), request)
}

fn message(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut message = vec![0; 40];
    message[..4].copy_from_slice(&(40 + body.len() as u32).to_le_bytes());
    message[4..8].copy_from_slice(&opcode.to_le_bytes());
    message[8..16].copy_from_slice(&unique.to_le_bytes());
    message.extend_from_slice(body);
    message
}

fn reply(unique: u64, body: &[u8]) -> Vec<u8> {
    let length = (REPLY_HEADER + body.len()) as u32;
    [&length.to_le_bytes()[..], &0i32.to_le_bytes(), &unique.to_le_bytes(), body].concat()
}

/// Offers `message` at an address of its own, in two pieces, with room for `room` bytes of reply.
fn offer(driver: &mut Driver, place: u64, message: &[u8], room: u32) -> u16 {
    driver.memory.write_slice(message, GuestAddress(REQUEST + place)).unwrap();
    let (first, rest) = (10, message.len() as u32 - 10);
    let mut buffers = vec![(REQUEST + place, first, false), (REQUEST + place + 10, rest, false)];
    if room > 0 {
        buffers.push((REPLY + place, room, true));
    }
    let head = driver.add(&buffers).unwrap();
    driver.notify();
    head
}

fn receive(server: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    server.read_exact(&mut bytes).unwrap();
    bytes
}

fn errno(driver: &Driver, place: u64) -> i32 {
    -i32::from_le_bytes(driver.bytes(REPLY + place + 4, 4).try_into().unwrap())
}

#[test]
fn replies_find_their_requests_in_any_order() {
    let (mut fs, mut server) = device();
    let (_hiprio, mut driver) = queues(&mut fs);
    let requests = [message(LOOKUP, 5, b"one\0"), message(LOOKUP, 6, b"other\0")];
    let heads = [offer(&mut driver, 0, &requests[0], 64), offer(&mut driver, 0x1000, &requests[1], 64)];
    assert_eq!(receive(&mut server, requests.concat().len()), requests.concat());
    // One whole and a piece, then the rest.
    let replies = [reply(6, b"second"), reply(5, b"first")].concat();
    server.write_all(&replies[..25]).unwrap();
    assert_eq!(driver.wait_used(), (heads[1], 22));
    server.write_all(&replies[25..]).unwrap();
    assert_eq!(driver.wait_used(), (heads[0], 21));
    assert_eq!(driver.bytes(REPLY, 21), reply(5, b"first"));
    assert_eq!(driver.bytes(REPLY + 0x1000, 22), reply(6, b"second"));
}

#[test]
fn what_has_no_answer_is_given_back_when_it_is_sent() {
    let (mut fs, mut server) = device();
    let (mut hiprio, _driver) = queues(&mut fs);
    let forget = message(FORGET, 7, &1u64.to_le_bytes());
    let head = offer(&mut hiprio, 0, &forget, 0);
    assert_eq!(hiprio.wait_used(), (head, 0));
    assert_eq!(receive(&mut server, forget.len()), forget);
}

#[test]
fn a_guest_that_breaks_the_protocol_reaches_no_server() {
    let (mut fs, mut server) = device();
    let (_hiprio, mut driver) = queues(&mut fs);
    let mut bad = message(LOOKUP, 5, b"x\0");
    bad[0] += 1;
    for wrong in [bad.as_slice(), &bad[..30]] {
        let head = offer(&mut driver, 0, wrong, 64);
        assert_eq!(driver.wait_used(), (head, 0));
    }
    let good = message(LOOKUP, 5, b"x\0");
    let waits = offer(&mut driver, 0, &good, 64);
    // The same number again while the first waits.
    let head = offer(&mut driver, 0x1000, &good, 64);
    assert_eq!(driver.wait_used(), (head, 0));
    assert_eq!(receive(&mut server, good.len()), good);
    server.write_all(&reply(5, b"")).unwrap();
    assert_eq!(driver.wait_used(), (waits, 16));
}

#[test]
fn a_reply_without_room_is_an_error_of_that_request_alone() {
    let (mut fs, mut server) = device();
    let (_hiprio, mut driver) = queues(&mut fs);
    for (unique, room, written) in [(1, 20, 16), (2, 8, 0)] {
        let request = message(LOOKUP, unique, b"x\0");
        let head = offer(&mut driver, 0, &request, room);
        receive(&mut server, request.len());
        server.write_all(&reply(unique, b"too much")).unwrap();
        assert_eq!(driver.wait_used(), (head, written));
        assert!(written == 0 || errno(&driver, 0) == libc::EIO);
    }
}

#[test]
fn a_lost_server_is_an_error_for_what_waits_and_what_comes() {
    for rubbish in [None, Some(reply(99, b"")), Some(vec![1; 16]), Some(vec![0xff; 16])] {
        let (mut fs, mut server) = device();
        let (_hiprio, mut driver) = queues(&mut fs);
        let request = message(LOOKUP, 5, b"x\0");
        let head = offer(&mut driver, 0, &request, 64);
        receive(&mut server, request.len());
        match &rubbish {
            Some(bytes) => server.write_all(bytes).unwrap(),
            None => drop(server),
        }
        assert_eq!(driver.wait_used(), (head, 16));
        assert_eq!(errno(&driver, 0), libc::ENOTCONN);
        let head = offer(&mut driver, 0x1000, &message(LOOKUP, 6, b"y\0"), 64);
        assert_eq!(driver.wait_used(), (head, 16));
        assert_eq!(errno(&driver, 0x1000), libc::ENOTCONN);
    }
}

#[test]
fn a_server_that_takes_its_time_gets_everything_in_order() {
    let (mut fs, mut server) = device();
    let (_hiprio, mut driver) = queues(&mut fs);
    // Far more than a socket holds.
    let body = vec![7; 600_000];
    let requests: Vec<_> = (1..=8).map(|unique| message(LOOKUP, unique, &body)).collect();
    for (place, request) in requests.iter().enumerate() {
        offer(&mut driver, 0x100000 * place as u64, request, 64);
    }
    for (place, request) in requests.iter().enumerate() {
        assert!(receive(&mut server, request.len()) == *request, "request {place}");
        server.write_all(&reply(place as u64 + 1, b"ok")).unwrap();
    }
    for _ in &requests {
        assert_eq!(driver.wait_used().1, 18);
    }
}

#[test]
fn after_a_reset_the_server_is_gone() {
    let (mut fs, mut server) = device();
    fs.reset();
    drop(queues(&mut fs));
    fs.reset();
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    let (_hiprio, mut driver) = queues(&mut fs);
    offer(&mut driver, 0, &message(LOOKUP, 5, b"x\0"), 64);
    driver.wait_used();
    assert_eq!(errno(&driver, 0), libc::ENOTCONN);
}

#[test]
fn the_configuration_space_has_the_tag_and_one_queue() {
    let (fs, _server) = device();
    let mut config = [0xff; 44];
    fs.read_config(0, &mut config);
    assert_eq!((&config[..8], config[36], config[40]), (&b"shares\0\0"[..], 1, 0));
    for bad in ["", "a/b", &"x".repeat(37)] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(Fs::new(bad, ours.into()).is_err());
    }
}
