//! The virtio devices of a VM.
//!
//! Each device runs in one worker thread of its own, which owns its queues from activation to reset. What a guest puts into
//! a queue is hostile: a chain is validated as a whole before anything is done for it, every loop is bounded by the size of
//! the queue, and a guest that breaks the ring itself loses its device and nothing else.

mod chain;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod queue;
mod starter;
mod sys;
#[cfg(test)]
mod testing;
pub(crate) mod worker;

pub mod balloon;
pub mod block;
pub mod fs;
pub mod mem;
pub mod net;
pub mod rng;
pub mod vsock;

pub use starter::Starter;

/// Reads `data.len()` bytes at `offset` of a device's configuration space; past its end are zeroes.
fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
}
