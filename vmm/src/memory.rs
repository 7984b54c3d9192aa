//! The guest's memory: anonymous pages that the host gives when they are first touched. What it may get while it runs is reserved behind
//! it, where nobody can access it before the memory device gives it.

use std::io;
use std::sync::Arc;

use isopod_proto::ErrorKind;
use vm_memory::mmap::{FromRangesError, MmapRegionBuilder};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::devices::mem::{BLOCK_BYTES, Backing};
use crate::virtio::GuestMemory;
use crate::{layout, sys};

/// Least memory a VM may have: a kernel, its initramfs and a little room.
pub const MIN_BYTES: u64 = 32 << 20;
/// Most memory a VM may have.
pub const MAX_BYTES: u64 = 4 << 40;
const PAGE: u64 = 4096;
/// Linux adds memory in sections of this (x86, SECTION_SIZE_BITS): a reserve that begins with one wastes none.
const SECTION: u64 = 128 << 20;

/// Guest memory that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size out of bounds or not of whole pages.
    #[error("memory of {0} bytes is not a multiple of 4096 between {MIN_BYTES} and {MAX_BYTES}")]
    Size(u64),
    /// The host does not give the address space.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// All of the guest's memory.
        bytes: u64,
        /// Why.
        #[source]
        source: FromRangesError,
    },
    /// The host does not give the address space of a reserve.
    #[error("cannot reserve {bytes} bytes for more guest memory")]
    Reserve {
        /// Its length.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl MemoryError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Size(_) => ErrorKind::InvalidArgument,
            Self::Map { .. } | Self::Reserve { .. } => ErrorKind::ResourceExhausted,
        }
    }
}

/// Checks a memory size, in bytes.
pub fn check_size(bytes: u64) -> Result<(), MemoryError> {
    if bytes.is_multiple_of(PAGE) && (MIN_BYTES..=MAX_BYTES).contains(&bytes) {
        return Ok(());
    }
    Err(MemoryError::Size(bytes))
}

/// Start and length of each piece of RAM for `bytes` of memory: one, or two around the PCI hole.
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(layout::PCI_WINDOW);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((layout::RAM_ABOVE_4G, bytes - low));
    }
    ranges
}

/// Maps `bytes` of memory for a guest.
pub fn allocate(bytes: u64) -> Result<GuestMemory, MemoryError> {
    check_size(bytes)?;
    let ranges: Vec<_> =
        ranges(bytes).into_iter().map(|(start, length)| (GuestAddress(start), length as usize)).collect();
    GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MemoryError::Map { bytes, source })
}

/// A part of the guest's address space that memory may come into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserve {
    /// Its guest-physical address.
    pub start: u64,
    /// Its bytes, a multiple of [`BLOCK_BYTES`].
    pub length: u64,
}

impl Reserve {
    /// What takes a VM of `bytes` to `most` bytes, as far as whole blocks do; `None` if there is no need for one.
    pub fn between(bytes: u64, most: u64) -> Option<Self> {
        let length = most.checked_sub(bytes)? / BLOCK_BYTES * BLOCK_BYTES;
        let ram_end = ranges(bytes).last().map_or(0, |(start, length)| start + length);
        let start = ram_end.max(layout::RAM_ABOVE_4G).next_multiple_of(SECTION);
        (length > 0).then_some(Self { start, length })
    }
}

/// `memory` with a reserve, that nobody can access yet, and what gives and takes parts of it.
pub fn with_reserve(memory: &GuestMemory, reserve: Reserve) -> Result<(GuestMemory, Box<dyn Backing>), MemoryError> {
    let Reserve { start, length } = reserve;
    let failed = |source: io::Error| MemoryError::Reserve { bytes: length, source };
    let mapping = MmapRegionBuilder::new(length as usize)
        .with_mmap_prot(libc::PROT_NONE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(|error| failed(io::Error::other(error)))?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(start));
    let region = Arc::new(region.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?);
    let all = memory.insert_region(Arc::clone(&region)).map_err(|error| failed(io::Error::other(error)))?;
    Ok((all, Box::new(Reserved(region))))
}

/// The host's side of a reserve.
struct Reserved(Arc<GuestRegionMmap<()>>);

impl Backing for Reserved {
    fn give(&self, offset: u64, length: u64) -> io::Result<()> {
        sys::protection::open(&self.0, offset, length)
    }

    fn take(&self, offset: u64, length: u64) -> io::Result<()> {
        sys::protection::close(&self.0, offset, length)
    }
}

/// End of the RAM below 4 GiB.
pub fn low_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, |region| region.start_addr().0 + region.len())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn a_reserve_begins_above_all_ram_and_above_4_gib() {
        let between = |bytes, most| Reserve::between(bytes, most).map(|Reserve { start, length }| (start, length));
        assert_eq!(between(128 << 20, 128 << 20), None);
        assert_eq!(between(128 << 20, 64 << 20), None);
        assert_eq!(between(128 << 20, 131 << 20), None);
        assert_eq!(between(130 << 20, 1 << 30), Some((4 << 30, (1 << 30) - (132 << 20))));
        assert_eq!(between((3 << 30) + (2 << 20), 8 << 30), Some(((4 << 30) + (128 << 20), (5 << 30) - (4 << 20))));
    }

    #[test]
    fn what_is_given_can_be_used_and_what_is_taken_is_zeroes_when_given_again() {
        let ram = allocate(MIN_BYTES).expect("memory");
        let reserve = Reserve { start: 1 << 32, length: 4 * BLOCK_BYTES };
        let (memory, backing) = with_reserve(&ram, reserve).expect("address space");
        let inside = GuestAddress(reserve.start + BLOCK_BYTES + 4096);
        backing.give(BLOCK_BYTES, BLOCK_BYTES).expect("given");
        memory.write_obj(7u64, inside).expect("in memory");
        backing.take(BLOCK_BYTES, BLOCK_BYTES).expect("taken");
        backing.give(0, 4 * BLOCK_BYTES).expect("given");
        assert_eq!(memory.read_obj::<u64>(inside).expect("in memory"), 0);
        for (offset, length) in [(4 * BLOCK_BYTES, BLOCK_BYTES), (0, 5 * BLOCK_BYTES), (u64::MAX, 1)] {
            assert!(backing.give(offset, length).is_err() && backing.take(offset, length).is_err());
        }
        assert_eq!(ram.iter().count() + 1, memory.iter().count());
    }

    #[test]
    fn memory_up_to_the_hole_is_one_range() {
        assert_eq!(ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
    }

    #[test]
    fn memory_past_the_hole_goes_on_at_4_gib() {
        assert_eq!(ranges((3 << 30) + 4096), [(0, 3 << 30), (1 << 32, 4096)]);
    }

    #[test]
    fn odd_tiny_and_huge_sizes_are_refused() {
        for bytes in [0, 4096, (64 << 20) + 1, MIN_BYTES - PAGE, MAX_BYTES + PAGE, u64::MAX] {
            assert!(matches!(check_size(bytes), Err(MemoryError::Size(_))), "{bytes}");
        }
        assert!(check_size(MIN_BYTES).is_ok());
    }

    #[test]
    fn low_end_is_where_the_first_region_ends() {
        let memory = allocate(64 << 20).expect("anonymous memory");
        assert_eq!(low_end(&memory), 64 << 20);
    }
}
