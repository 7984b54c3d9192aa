//! The guest's memory: anonymous pages that the host gives when they are first touched.

use isopod_proto::ErrorKind;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, mmap::FromRangesError};

use crate::layout;
use crate::virtio::GuestMemory;

/// Least memory a VM may have: a kernel, its initramfs and a little room.
pub const MIN_BYTES: u64 = 32 << 20;
/// Most memory a VM may have.
pub const MAX_BYTES: u64 = 4 << 40;
const PAGE: u64 = 4096;

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
}

impl MemoryError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Size(_) => ErrorKind::InvalidArgument,
            Self::Map { .. } => ErrorKind::ResourceExhausted,
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

/// End of the RAM below 4 GiB.
pub fn low_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, |region| region.start_addr().0 + region.len())
}

#[cfg(test)]
mod tests {
    use super::*;

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
