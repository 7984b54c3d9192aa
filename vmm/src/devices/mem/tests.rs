use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::testing::{BUFFERS, Driver, activate, memory};
use crate::virtio::VirtioDevice;

const START: u64 = 1 << 32;
const RESPONSE: u64 = BUFFERS + 64;

/// Keeps what is given, and refuses when told to.
#[derive(Clone, Default)]
struct TestBacking {
    given: Arc<Mutex<Vec<(u64, u64)>>>,
    /// Calls that are still to succeed.
    good: Arc<AtomicU64>,
}

impl TestBacking {
    fn call(&self) -> io::Result<()> {
        let left = self.good.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        left.map(drop).map_err(|_| io::ErrorKind::OutOfMemory.into())
    }
}

impl Backing for TestBacking {
    fn give(&self, offset: u64, length: u64) -> io::Result<()> {
        self.call()?;
        self.given.lock().unwrap().push((offset, length));
        Ok(())
    }

    fn take(&self, offset: u64, length: u64) -> io::Result<()> {
        self.call()?;
        let range = offset..offset + length;
        self.given.lock().unwrap().retain(|(offset, _)| !range.contains(offset));
        Ok(())
    }
}

fn device() -> (Mem, TestBacking) {
    let backing = TestBacking::default();
    backing.good.store(1000, Ordering::Relaxed);
    (Mem::new(START, 16 * BLOCK_BYTES, Box::new(backing.clone())), backing)
}

/// Asks the device, and returns type and state of its answer.
fn ask(driver: &mut Driver, kind: u16, block: u64, count: u16) -> (u16, u16) {
    let mut request = [0; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&(START + block * BLOCK_BYTES).to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    driver.memory.write_slice(&request, GuestAddress(BUFFERS)).unwrap();
    assert_eq!(driver.request(&[(BUFFERS, 24, false), (RESPONSE, 10, true)]), 10);
    let answer = driver.bytes(RESPONSE, 10);
    (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
}

/// Plugged and requested size, as the driver reads them.
fn sizes(mem: &Mem) -> (u64, u64) {
    let mut bytes = [0; 16];
    mem.read_config(40, &mut bytes);
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    (number(0), number(8))
}

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);

#[test]
fn blocks_are_given_as_requested_and_taken_again() {
    let (mut mem, backing) = device();
    let control = mem.control();
    let mut driver = activate(&mut mem, &memory(), 0).remove(0);
    assert_eq!(ask(&mut driver, PLUG, 0, 1), NACK, "nothing is requested yet");
    let generation = mem.config_generation();
    control.request(4 * BLOCK_BYTES).unwrap();
    assert_ne!(mem.config_generation(), generation);
    assert_eq!(sizes(&mem), (0, 4 * BLOCK_BYTES));

    assert_eq!(ask(&mut driver, PLUG, 2, 3), ACK);
    assert_eq!(ask(&mut driver, PLUG, 4, 1), ERROR, "it has that one");
    assert_eq!(ask(&mut driver, PLUG, 8, 2), NACK, "that is one too many");
    assert_eq!(ask(&mut driver, PLUG, 8, 1), ACK);
    assert_eq!(control.plugged_bytes(), 4 * BLOCK_BYTES);
    assert_eq!(*backing.given.lock().unwrap(), [(2 * BLOCK_BYTES, 3 * BLOCK_BYTES), (8 * BLOCK_BYTES, BLOCK_BYTES)]);
    for (block, count, state) in [(2, 3, 0), (0, 2, 1), (1, 2, 2)] {
        assert_eq!(ask(&mut driver, STATE, block, count), (0, state));
    }

    control.request(0).unwrap();
    assert_eq!(ask(&mut driver, UNPLUG, 4, 2), ERROR, "it does not have both");
    assert_eq!(ask(&mut driver, UNPLUG, 8, 1), ACK);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(sizes(&mem), (0, 0));
    assert!(backing.given.lock().unwrap().is_empty());
}

#[test]
fn what_the_host_refuses_the_guest_may_ask_again() {
    let (mut mem, backing) = device();
    let control = mem.control();
    let mut driver = activate(&mut mem, &memory(), 0).remove(0);
    control.request(2 * BLOCK_BYTES).unwrap();
    backing.good.store(0, Ordering::Relaxed);
    assert_eq!(ask(&mut driver, PLUG, 0, 1), BUSY);
    assert_eq!(control.plugged_bytes(), 0);
    backing.good.store(1, Ordering::Relaxed);
    assert_eq!(ask(&mut driver, PLUG, 0, 1), ACK);
    assert_eq!(ask(&mut driver, UNPLUG, 0, 1), BUSY);
    assert_eq!(control.plugged_bytes(), BLOCK_BYTES);
}

#[test]
fn what_is_no_request_is_an_error_and_the_next_one_is_served() {
    let (mut mem, _backing) = device();
    let control = mem.control();
    let mut driver = activate(&mut mem, &memory(), 0).remove(0);
    control.request(BLOCK_BYTES).unwrap();
    assert_eq!(ask(&mut driver, 9, 0, 1), ERROR);
    assert_eq!(ask(&mut driver, PLUG, 16, 1), ERROR);
    assert_eq!(ask(&mut driver, STATE, 0, 0), ERROR);
    driver.memory.write_slice(&[0xff; 24], GuestAddress(BUFFERS)).unwrap();
    assert_eq!(driver.request(&[(BUFFERS, 23, false), (RESPONSE, 10, true)]), 10);
    assert_eq!(driver.bytes(RESPONSE, 2), [3, 0], "too short");
    assert_eq!(driver.request(&[(BUFFERS, 24, false), (RESPONSE, 9, true)]), 0, "no room");
    assert_eq!(driver.request(&[(BUFFERS, 24, false)]), 0);
    assert_eq!(ask(&mut driver, PLUG, 0, 1), ACK);
}

#[test]
fn a_reset_takes_nothing_away() {
    let (mut mem, backing) = device();
    let control = mem.control();
    let mut driver = activate(&mut mem, &memory(), 0).remove(0);
    control.request(BLOCK_BYTES).unwrap();
    assert_eq!(ask(&mut driver, PLUG, 3, 1), ACK);
    mem.reset();
    assert_eq!(sizes(&mem), (BLOCK_BYTES, BLOCK_BYTES));
    assert_eq!(backing.given.lock().unwrap().len(), 1);
    let mut driver = activate(&mut mem, &memory(), 0).remove(0);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    assert!(backing.given.lock().unwrap().is_empty());
}

#[test]
fn a_size_beyond_the_range_is_refused() {
    let (mem, _backing) = device();
    let error = mem.control().request(17 * BLOCK_BYTES).unwrap_err();
    assert_eq!((error.bytes, error.most), (17 * BLOCK_BYTES, 16 * BLOCK_BYTES));
    assert!(mem.control().request(4096).is_err());
}
