//! virtio over PCI (virtio 1.2, 4.1): one function for each device, with all its structures in one memory BAR.
//!
//! ```text
//! 0x0000 common configuration    0x3000 notifications, 4 bytes a queue
//! 0x1000 ISR status              0x4000 MSI-X table
//! 0x2000 device configuration    0x5000 MSI-X pending bits
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PciFunction;
use super::common_config::{Action, CONFIG_GENERATION, CommonConfig, NO_VECTOR};
use super::config_space::{BAR0, COMMAND, ConfigSpace, Identity};
use super::msix::{Msix, VectorBackend};
use crate::devices::Starter;
use crate::virtio::{Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice};

/// Bytes of the memory BAR.
pub const BAR_SIZE: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const NOTIFY_MULTIPLIER: u32 = 4;

const VENDOR: u16 = 0x1af4;
/// Modern devices' ids are this and the virtio device type.
const DEVICE_BASE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// Offset of the message control register in the MSI-X capability.
const MSIX_CONTROL: u16 = 2;
const MSIX_CONTROL_WRITABLE: [u8; 2] = [0, 0xc0];

/// Connects the guest's notifications to eventfds.
pub trait Notifications: Send {
    /// From now on a write to guest-physical `address` signals `event` and does not reach the function.
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes it.
    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// A virtio device as a PCI function.
pub struct VirtioFunction {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    starter: Arc<Starter>,
    config: ConfigSpace,
    msix_control: u16,
    common: CommonConfig,
    interrupt: Arc<MsixInterrupt>,
    notifications: Box<dyn Notifications>,
    /// Eventfds of the active queues, by queue index. Empty unless the device is active.
    queue_events: Vec<(u16, EventFd)>,
    /// Where they are attached.
    attached_at: Option<u64>,
}

impl VirtioFunction {
    /// A function whose BAR is at `bar`. The guest may move it.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        starter: Arc<Starter>,
        bar: u32,
        vectors: Box<dyn VectorBackend>,
        notifications: Box<dyn Notifications>,
    ) -> Self {
        let queues = device.queue_sizes().len() as u16;
        let vector_count = queues + 1;
        let mut config = ConfigSpace::new(&identity(device.device_type()));
        config.set_memory_bar(bar, BAR_SIZE as u32);
        let msix_capability = add_capabilities(&mut config, vector_count);
        Self {
            common: CommonConfig::new(device.features(), device.queue_sizes(), vector_count),
            interrupt: Arc::new(MsixInterrupt {
                msix: Mutex::new(Msix::new(vector_count, vectors)),
                config_vector: AtomicU16::new(NO_VECTOR),
                queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            }),
            device,
            memory,
            starter,
            config,
            msix_control: msix_capability + MSIX_CONTROL,
            notifications,
            queue_events: vec![],
            attached_at: None,
        }
    }

    /// Starts the device with what the driver set up; a driver that set it up wrong finds NEEDS_RESET.
    fn activate(&mut self) {
        if self.try_activate().is_none() {
            self.common.needs_reset();
            // The driver reads the status anyway when its device does not answer.
            let _ = self.interrupt.signal_config();
        }
    }

    fn try_activate(&mut self) -> Option<()> {
        let mut queues = vec![];
        let mut events = vec![];
        for (index, queue) in self.common.build_queues(&self.memory)? {
            let notify = EventFd::new(EFD_NONBLOCK).ok()?;
            events.push((index, notify.try_clone().ok()?));
            queues.push(ActiveQueue { index, queue, notify });
        }
        self.queue_events = events;
        self.attach_notifications();
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.common.features(),
            queues,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            starter: Arc::clone(&self.starter),
        };
        if self.device.activate(activation).is_err() {
            self.detach_notifications();
            self.queue_events.clear();
            return None;
        }
        Some(())
    }

    /// Attaches the queues' eventfds where the BAR is now. Where KVM refuses, the slow path of
    /// [`VirtioFunction::write_memory`] notifies.
    fn attach_notifications(&mut self) {
        self.detach_notifications();
        let Some(bar) = self.config.memory_bar() else { return };
        for (index, event) in &self.queue_events {
            let _ = self.notifications.attach(notify_address(bar, *index), event);
        }
        self.attached_at = Some(bar);
    }

    fn detach_notifications(&mut self) {
        let Some(bar) = self.attached_at.take() else { return };
        for (index, event) in &self.queue_events {
            // What was never attached is not there; both are fine.
            let _ = self.notifications.detach(notify_address(bar, *index), event);
        }
    }

    /// Stops the device and forgets what the driver set up.
    fn reset(&mut self) {
        self.detach_notifications();
        self.device.reset();
        self.queue_events.clear();
        self.common.reset();
        self.interrupt.forget_vectors();
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match self.common.write(offset, data) {
            Some(Action::Reset) => self.reset(),
            Some(Action::Activate) => self.activate(),
            Some(Action::Vector(queue, vector)) => self.interrupt.set_vector(queue, vector),
            None => {}
        }
    }

    /// A notification that did not go to an eventfd: in the moment of an activation, or where KVM refused one.
    fn notify(&self, offset: u64) {
        let index = offset / u64::from(NOTIFY_MULTIPLIER);
        if let Some((_, event)) = self.queue_events.iter().find(|(queue, _)| u64::from(*queue) == index) {
            // Full means that a notification is pending.
            let _ = event.write(1);
        }
    }
}

impl Drop for VirtioFunction {
    fn drop(&mut self) {
        self.detach_notifications();
        self.device.reset();
    }
}

impl PciFunction for VirtioFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let end = offset + data.len() as u16;
        let touches = |register: u16, size: u16| offset < register + size && register < end;
        if touches(COMMAND, 2) || touches(BAR0, 4) {
            let moved = self.attached_at != self.config.memory_bar();
            if moved && !self.queue_events.is_empty() {
                self.attach_notifications();
            }
        }
        if touches(self.msix_control, 2) {
            self.interrupt.msix.lock().set_control(self.config.u16(self.msix_control));
        }
    }

    fn memory_bar(&self) -> Option<u64> {
        self.config.memory_bar()
    }

    fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        let inner = offset % PAGE;
        match offset - inner {
            COMMON if inner == CONFIG_GENERATION && data.len() == 1 => data[0] = self.device.config_generation(),
            COMMON => self.common.read(inner, data),
            DEVICE => self.device.read_config(inner, data),
            MSIX_TABLE => self.interrupt.msix.lock().read_table(inner, data),
            MSIX_PENDING => self.interrupt.msix.lock().read_pending(inner, data),
            // The ISR status is for INTx, which there is none of.
            _ => data.fill(0),
        }
    }

    fn write_memory(&mut self, offset: u64, data: &[u8]) {
        let inner = offset % PAGE;
        match offset - inner {
            COMMON => self.write_common(inner, data),
            DEVICE => self.device.write_config(inner, data),
            NOTIFY => self.notify(inner),
            MSIX_TABLE => self.interrupt.msix.lock().write_table(inner, data),
            _ => {}
        }
    }
}

fn notify_address(bar: u64, queue: u16) -> u64 {
    bar + NOTIFY + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER)
}

/// Which device this is, and a class that fits it, for people who look at a list of functions.
fn identity(device_type: u16) -> Identity {
    let class = match device_type {
        1 => 0x02_0000,
        2 => 0x01_8000,
        _ => 0xff_0000,
    };
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_type,
        subsystem: DEVICE_BASE + device_type,
        revision: 1,
        class,
    }
}

/// Adds the MSI-X capability and the structures' (4.1.4), and returns where the former is.
fn add_capabilities(config: &mut ConfigSpace, vectors: u16) -> u16 {
    let mut body = vec![];
    body.extend((vectors - 1).to_le_bytes());
    body.extend((MSIX_TABLE as u32).to_le_bytes());
    body.extend((MSIX_PENDING as u32).to_le_bytes());
    let msix = config.add_capability(CAPABILITY_MSIX, &body);
    config.allow(usize::from(msix + MSIX_CONTROL), &MSIX_CONTROL_WRITABLE);

    let structures: [(u8, u64, &[u8]); 4] =
        [(1, COMMON, &[]), (2, NOTIFY, &NOTIFY_MULTIPLIER.to_le_bytes()), (3, ISR, &[]), (4, DEVICE, &[])];
    for (kind, offset, extra) in structures {
        // cap_len, cfg_type, bar, id and padding, offset, length.
        let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((PAGE as u32).to_le_bytes());
        body.extend(extra);
        config.add_capability(CAPABILITY_VENDOR, &body);
    }
    msix
}

/// A function's interrupts, as its device sees them.
struct MsixInterrupt {
    msix: Mutex<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl MsixInterrupt {
    fn set_vector(&self, queue: Option<u16>, vector: u16) {
        let slot = match queue {
            None => Some(&self.config_vector),
            Some(index) => self.queue_vectors.get(usize::from(index)),
        };
        if let Some(slot) = slot {
            slot.store(vector, Ordering::Release);
        }
    }

    fn forget_vectors(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }
}

impl Interrupt for MsixInterrupt {
    fn signal_queue(&self, index: u16) -> io::Result<()> {
        let Some(vector) = self.queue_vectors.get(usize::from(index)) else { return Ok(()) };
        self.msix.lock().raise(vector.load(Ordering::Acquire))
    }

    fn signal_config(&self) -> io::Result<()> {
        self.msix.lock().raise(self.config_vector.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests;
