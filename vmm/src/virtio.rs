//! What a virtio device is, without any transport (virtio 1.2, section 2).
//!
//! The transport ([`crate::pci`]) negotiates features, keeps the queues' addresses while the driver sets them up, and gives
//! all of it to the device by [`VirtioDevice::activate`]. From then on the device's worker thread owns the queues: it waits for
//! the driver's notifications on the queues' eventfds, which KVM signals (ioeventfd), and raises interrupts through
//! [`Interrupt`], which writes eventfds that KVM turns into MSI-X messages (irqfd). The data path returns to user space
//! for neither.

use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::Starter;

/// Guest memory as devices see it. Regions are never removed while a device is active.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
#[error("the {device} device cannot start: {what}")]
pub struct ActivateError {
    /// Name of the device, such as "block img-0".
    pub device: String,
    /// What was tried.
    pub what: &'static str,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl ActivateError {
    /// The error of a device whose worker does not start.
    pub fn no_worker(device: String) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { device, what: "its worker cannot be started", source }
    }
}

/// Raises a device's interrupts. Calls never block.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that queue `index` has used buffers.
    fn signal_queue(&self, index: u16) -> io::Result<()>;
    /// Tells the driver that the configuration space changed.
    fn signal_config(&self) -> io::Result<()>;
    /// The device has stopped and must be reset (virtio 1.2, section 2.1.2): the transport sets DEVICE_NEEDS_RESET where it
    /// can, and tells the driver as for a changed configuration.
    fn device_needs_reset(&self) -> io::Result<()> {
        self.signal_config()
    }
}

/// A queue the driver has set up, and the eventfd it notifies.
pub struct ActiveQueue {
    /// Position among the device's queues.
    pub index: u16,
    /// The split virtqueue; its addresses come from the driver and are checked at each use.
    pub queue: Queue,
    /// Readable when the driver has notified the device.
    pub notify: EventFd,
}

/// Everything a device needs to run.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Feature bits that both sides agreed on.
    pub features: u64,
    /// The queues that the driver enabled, in order of index.
    pub queues: Vec<ActiveQueue>,
    /// Where interrupts go.
    pub interrupt: Arc<dyn Interrupt>,
    /// Starts the device's worker.
    pub starter: Arc<Starter>,
}

/// A virtio device as the transport sees it.
///
/// None of the methods may panic or block for the guest's doing; offsets and values come from the guest.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2, section 5).
    fn device_type(&self) -> u16;
    /// Name for logs and thread names, such as "block img-0".
    fn name(&self) -> String;
    /// Feature bits offered, without VIRTIO_F_VERSION_1, which the transport adds.
    fn features(&self) -> u64;
    /// The largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Reads the device's configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device's configuration space; what is read-only or past its end is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Changes whenever the configuration space does by itself (4.1.4.3.1), so that a driver that reads it in pieces finds out.
    fn config_generation(&self) -> u8 {
        0
    }
    /// Starts the device's worker.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops and joins the worker and returns to the state before [`VirtioDevice::activate`]. Idempotent. After it no
    /// guest memory is touched.
    fn reset(&mut self);
}
