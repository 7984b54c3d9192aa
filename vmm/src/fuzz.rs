//! Entry points for the fuzzer (`fuzz/`): everything in a VMM that gets bytes of a guest, or of the daemon.
//!
//! A device is driven as a guest drives it: through the registers of its PCI function and through memory. Its worker runs in
//! the fuzzer's thread ([`crate::devices::worker::inline`]), so that what happens depends on the input alone.

mod bytes;
mod devices;
mod guest;

pub use crate::devices::fuzz::chain;
pub use bytes::{config, control, registers};
pub use devices::{balloon, block, file_system, mem, net, rng, vsock};
