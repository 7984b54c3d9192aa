//! The block device (virtio 1.2, section 5.2): parts of files, one after the other, shown as one disk.
//!
//! Requests are served one after the other in the device's worker by system calls straight to and from guest memory.

mod device;
mod disk;
mod request;
mod worker;

pub use device::{Block, BlockError};
pub use disk::Segment;

/// Bytes of a sector, the unit of all the positions and lengths of the device (5.2).
pub const SECTOR: u64 = 512;
