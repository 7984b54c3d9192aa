//! The serial console: a 16550 whose output goes into a ring that is looked at when a boot has failed.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use isopod_proto::CONSOLE_RING_BYTES;
use parking_lot::Mutex;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// The newest [`CONSOLE_RING_BYTES`] bytes that the guest wrote. Clones share them.
#[derive(Clone, Default)]
pub struct ConsoleRing {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl ConsoleRing {
    /// A copy of what is in the ring, oldest first.
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.lock().iter().copied().collect()
    }

    /// The last `limit` bytes, oldest first.
    pub fn tail(&self, limit: usize) -> Vec<u8> {
        tail(&self.bytes.lock(), limit)
    }

    /// The same, unless the ring is in use right now.
    pub fn try_tail(&self, limit: usize) -> Option<Vec<u8>> {
        self.bytes.try_lock().map(|bytes| tail(&bytes, limit))
    }
}

fn tail(bytes: &VecDeque<u8>, limit: usize) -> Vec<u8> {
    bytes.iter().skip(bytes.len().saturating_sub(limit)).copied().collect()
}

impl io::Write for ConsoleRing {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bytes = self.bytes.lock();
        bytes.extend(data);
        let excess = bytes.len().saturating_sub(CONSOLE_RING_BYTES);
        bytes.drain(..excess);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt line of the serial port, which KVM raises when the eventfd is written.
pub struct SerialInterrupt(pub EventFd);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port.
pub struct SerialConsole {
    port: Serial<SerialInterrupt, NoEvents, ConsoleRing>,
}

impl SerialConsole {
    /// A port that raises `interrupt` and writes into `ring`.
    pub fn new(interrupt: SerialInterrupt, ring: ConsoleRing) -> Self {
        Self { port: Serial::new(interrupt, ring) }
    }

    /// Reads register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.port.read(offset)
    }

    /// Writes register `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        // It can only fail by the interrupt's eventfd being full, when the interrupt is pending anyway, or by a full input
        // buffer in loopback mode, which is the guest's own doing.
        let _ = self.port.write(offset, value);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_bytes() {
        let mut ring = ConsoleRing::default();
        ring.write_all(&vec![b'a'; CONSOLE_RING_BYTES]).expect("never fails");
        ring.write_all(b"end").expect("never fails");
        assert_eq!(ring.contents().len(), CONSOLE_RING_BYTES);
        assert!(ring.contents().ends_with(b"aend"));
        assert_eq!(ring.tail(3), b"end");
    }

    #[test]
    fn what_the_guest_transmits_is_in_the_ring() {
        let ring = ConsoleRing::default();
        let mut console = SerialConsole::new(SerialInterrupt(EventFd::new(0).expect("eventfd")), ring.clone());
        for byte in *b"hi" {
            console.write(0, byte);
        }
        assert_eq!(ring.contents(), b"hi");
    }
}
