//! Descriptor chains (virtio 1.2, section 2.7), validated as a whole before they are used.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, VolatileSlice};

use crate::virtio::GuestMemory;

/// Most descriptors a chain may have, whatever an indirect table could hold: no request of ours needs more.
pub(super) const MAX_DESCRIPTORS: usize = 1024;

/// Why a chain cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    /// It has no descriptor, loops, leaves the table, or goes through a bad indirect table.
    #[error("the chain has no end")]
    Endless,
    /// It has more descriptors than [`MAX_DESCRIPTORS`].
    #[error("the chain is too long")]
    TooLong,
    /// A buffer is not in the guest's memory.
    #[error("a buffer is outside the memory")]
    OutsideMemory,
    /// A device-readable buffer follows a device-writable one (2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Misordered,
}

/// A piece of guest memory that was in the memory when the chain was validated; memory is never taken away from an active
/// device.
#[derive(Debug, Clone, Copy)]
struct Range {
    address: GuestAddress,
    length: usize,
}

/// The buffers of one direction, as one run of bytes that is consumed from its front.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    ranges: Vec<Range>,
    /// The first range that is not consumed yet.
    first: usize,
    length: usize,
}

/// One request of the driver. Kept and filled again for each request, so that none allocates.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// What the device may read.
    pub readable: Buffers,
    /// What the device may write.
    pub writable: Buffers,
}

impl Chain {
    /// Walks `descriptors` to their end and takes their buffers over.
    pub fn fill(&mut self, descriptors: DescriptorChain<&GuestMemory>) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let memory = descriptors.memory();
        let (mut count, mut ended) = (0, false);
        for descriptor in descriptors.clone() {
            count += 1;
            if count > MAX_DESCRIPTORS {
                return Err(ChainError::TooLong);
            }
            ended = !descriptor.has_next();
            let range = Range { address: descriptor.addr(), length: descriptor.len() as usize };
            if range.length > 0 && !memory.check_range(range.address, range.length) {
                return Err(ChainError::OutsideMemory);
            }
            if descriptor.is_write_only() {
                self.writable.push(range);
            } else if self.writable.ranges.is_empty() {
                self.readable.push(range);
            } else {
                return Err(ChainError::Misordered);
            }
        }
        // The iterator ends without a word where it cannot go on: then the last descriptor it gave has a successor.
        if ended { Ok(()) } else { Err(ChainError::Endless) }
    }
}

impl Buffers {
    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.length
    }

    fn clear(&mut self) {
        self.ranges.clear();
        self.first = 0;
        self.length = 0;
    }

    fn push(&mut self, range: Range) {
        if range.length > 0 {
            // The walk ends before the sum of a chain's lengths exceeds 4 GiB.
            self.length += range.length;
            self.ranges.push(range);
        }
    }

    /// Consumes `count` bytes, or all if there are fewer.
    pub fn skip(&mut self, count: usize) {
        let mut left = count.min(self.length);
        self.length -= left;
        while left > 0 {
            let range = &mut self.ranges[self.first];
            let step = left.min(range.length);
            // Validated to be in memory, so that its end does not overflow.
            range.address.0 += step as u64;
            range.length -= step;
            left -= step;
            if range.length == 0 {
                self.first += 1;
            }
        }
    }

    /// Keeps the first `length` bytes only.
    pub fn truncate(&mut self, length: usize) {
        while self.length > length {
            let excess = self.length - length;
            let range = self.ranges.last_mut().expect("bytes are left");
            let step = excess.min(range.length);
            range.length -= step;
            self.length -= step;
            if range.length == 0 {
                self.ranges.pop();
            }
        }
    }

    /// Takes the last byte away and returns its address.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.ranges.last()?;
        let address = GuestAddress(last.address.0 + last.length.checked_sub(1)? as u64);
        self.truncate(self.length - 1);
        Some(address)
    }

    /// Copies `bytes.len()` bytes out and consumes them. `None`: there are fewer.
    pub fn read(&mut self, memory: &GuestMemory, bytes: &mut [u8]) -> Option<()> {
        if bytes.len() > self.length {
            return None;
        }
        let mut left = bytes;
        while !left.is_empty() {
            let range = self.ranges[self.first];
            let (now, later) = left.split_at_mut(range.length.min(left.len()));
            memory.read_slice(now, range.address).ok()?;
            self.skip(now.len());
            left = later;
        }
        Some(())
    }

    /// Copies `bytes` in and consumes as much. `None`: there is less room.
    pub fn write(&mut self, memory: &GuestMemory, bytes: &[u8]) -> Option<()> {
        if bytes.len() > self.length {
            return None;
        }
        let mut left = bytes;
        while !left.is_empty() {
            let range = self.ranges[self.first];
            let (now, later) = left.split_at(range.length.min(left.len()));
            memory.write_slice(now, range.address).ok()?;
            self.skip(now.len());
            left = later;
        }
        Some(())
    }

    /// What is left, as slices of host memory.
    pub fn slices<'m>(&self, memory: &'m GuestMemory) -> impl Iterator<Item = VolatileSlice<'m>> {
        self.ranges[self.first..]
            .iter()
            .flat_map(|range| memory.get_slices(range.address, range.length))
            // A range was validated, so that there is no error; were there one, what follows must not move up.
            .map_while(Result::ok)
    }
}
