//! PCI: bus 0 with its configuration space, MSI-X, and virtio's PCI transport.
//!
//! All registers are the guest's to read and write in any order and width. Each access is total: what means nothing reads as
//! zero and is ignored when written.

mod bus;
mod common_config;
mod config_space;
mod host_bridge;
mod msix;
mod transport;
mod window;

pub use bus::{FunctionNumber, PciBus, PciError};
pub use host_bridge::HostBridge;
use host_bridge::Placeholder;
pub use msix::{MsiMessage, VectorBackend};
pub use transport::{BAR_SIZE, Notifications, VirtioFunction};
pub use window::ConfigWindow;

/// One function on the bus.
pub trait PciFunction: Send {
    /// Reads configuration space; `offset` is below 4096 and the access does not cross a 4-byte boundary.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space, with the same bounds.
    fn write_config(&mut self, offset: u16, data: &[u8]);
    /// The address of its memory BAR, if it decodes one now. It is [`BAR_SIZE`] long.
    fn memory_bar(&self) -> Option<u64>;
    /// Reads its memory BAR; `offset` is below [`BAR_SIZE`].
    fn read_memory(&mut self, offset: u64, data: &mut [u8]);
    /// Writes its memory BAR, with the same bound.
    fn write_memory(&mut self, offset: u64, data: &[u8]);
}
