//! The memory device (virtio 1.2, section 5.15): memory that the guest is given, and gives back, while it runs.
//!
//! Its range of the guest's address space is reserved from the start, and nobody can access it. How much of it the guest may have is
//! what the daemon requests; which blocks these are the guest's driver decides, and asks for each.

mod blocks;
mod device;
mod request;

#[cfg(test)]
mod tests;

pub use blocks::BLOCK_BYTES;
pub use device::{Mem, MemControl, MemError};

use std::io;

/// The host's side of the range: offsets and lengths are multiples of [`BLOCK_BYTES`], within the range.
pub trait Backing: Send + Sync {
    /// Lets the guest access these bytes, which are zeroes.
    fn give(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Takes them away, and frees them. After an error the guest has them still.
    fn take(&self, offset: u64, length: u64) -> io::Result<()>;
}
