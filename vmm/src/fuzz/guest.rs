//! A guest that does whatever the input says.

use std::io;
use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::Starter;
use crate::devices::worker::inline;
use crate::layout;
use crate::pci::{HostBridge, MsiMessage, Notifications, PciBus, VectorBackend, VirtioFunction};
use crate::virtio::{GuestMemory, VirtioDevice};

/// Bytes of the first of two pieces of memory, and where the second one is, of a page.
const MEMORY: u64 = 256 << 10;
const HIGH: u64 = 0x10_0000;
/// Entries of the queues that the guest sets up at first.
const QUEUE_SIZE: u16 = 16;
/// What lies where in the pages of a queue.
const QUEUE_BYTES: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where buffers begin.
const BUFFERS: u64 = 0x1_0000;
const BAR: u64 = layout::PCI_WINDOW + 0x8000;
const NOTIFY: u64 = 0x3000;

/// One thing that a guest, or the other end of a device, does.
#[derive(Debug, Arbitrary)]
pub(super) enum Step {
    /// Makes a chain available, and notifies. `sound`: its content is mended so that the device can read it.
    Chain { queue: u8, sound: bool, buffers: Vec<Buffer> },
    /// Writes into memory.
    Memory { at: u32, bytes: Vec<u8> },
    /// Writes a descriptor as it is.
    Descriptor { queue: u8, index: u8, address: u64, length: u32, flags: u16, next: u16 },
    /// Sets the available index, and notifies.
    Available { queue: u8, index: u16, head: u16 },
    /// Accesses configuration space or the memory BAR.
    Register { config: bool, write: bool, offset: u16, width: u8, value: u64 },
    /// Resets the device, and sets it up again.
    Restart { features: u64 },
    /// Something happens at the other end.
    Host(Host),
}

/// What the other end of a device does.
#[derive(Debug, Arbitrary)]
pub(super) enum Host {
    Send(Vec<u8>),
    Receive,
    Open(u8),
    Close,
}

/// A part of a chain.
#[derive(Debug, Arbitrary)]
pub(super) enum Buffer {
    /// The device may read these bytes.
    Readable(Vec<u8>),
    /// As many bytes that are there already, of which `bytes` are the first.
    Long { bytes: Vec<u8>, length: u16 },
    /// The device may write as many bytes.
    Writable(u16),
    /// Anything anywhere.
    Wild { address: u64, length: u32, writable: bool },
    /// A table of descriptors.
    Indirect(u8),
}

/// The other end of a device.
pub(super) trait Outside {
    /// Does what the input says.
    fn act(&mut self, action: Host);
    /// Mends the beginning of a request of `total` readable bytes.
    fn mend(&mut self, _bytes: &mut [u8], _total: usize) {}
}

struct Nobody;

impl VectorBackend for Nobody {
    fn route(&mut self, _vector: u16, _message: MsiMessage) -> io::Result<()> {
        Ok(())
    }
    fn fire(&self, _vector: u16) -> io::Result<()> {
        Ok(())
    }
}

impl Notifications for Nobody {
    fn attach(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
    fn detach(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

/// One for all; it has nothing to do, as devices are driven without threads here.
fn starter() -> Arc<Starter> {
    static STARTER: OnceLock<Arc<Starter>> = OnceLock::new();
    Arc::clone(STARTER.get_or_init(|| Arc::new(Starter::start().expect("a thread can be started"))))
}

/// A bus with nothing but a host bridge and `devices`, each where the guest finds it.
pub(super) fn bus(devices: Vec<Box<dyn VirtioDevice>>, memory: &GuestMemory) -> PciBus {
    let mut bus = PciBus::new(Box::new(HostBridge::new()));
    for (device, bar) in devices.into_iter().zip((BAR as u32..).step_by(0x8000)) {
        let place = bus.free_place().expect("the bus is empty");
        let function = VirtioFunction::new(device, memory.clone(), starter(), bar, Box::new(Nobody), Box::new(Nobody));
        bus.insert(place, Box::new(function));
    }
    bus
}

/// Memory of zeroes. It is the same one each time: mapping takes longer than clearing.
pub(super) fn memory() -> GuestMemory {
    thread_local! {
        static MEMORY_ONCE: GuestMemory =
            GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize), (GuestAddress(HIGH), 4096)]).expect("mapped");
    }
    let memory = MEMORY_ONCE.with(Clone::clone);
    memory.write_slice(&[0; MEMORY as usize], GuestAddress(0)).expect("in memory");
    memory.write_slice(&[0; 4096], GuestAddress(HIGH)).expect("in memory");
    memory
}

struct Guest {
    bus: PciBus,
    memory: GuestMemory,
    queues: u16,
    available: [u16; 4],
    /// Where the next buffer goes.
    free: u64,
}

/// Drives `device` as `input` says.
pub(super) fn drive(device: Box<dyn VirtioDevice>, outside: &mut dyn Outside, input: &[u8]) {
    let queues = device.queue_sizes().len() as u16;
    let memory = memory();
    let mut guest = Guest { bus: bus(vec![device], &memory), memory, queues, available: [0; 4], free: BUFFERS };
    guest.restart(u64::MAX);
    let mut input = Unstructured::new(input);
    while !input.is_empty() {
        let Ok(step) = Step::arbitrary(&mut input) else { break };
        guest.step(step, outside);
        inline::run();
    }
    drop(guest);
}

impl Guest {
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.bus.write(BAR + offset, data);
    }

    /// What a driver does at its beginning (virtio 1.2, section 3.1.1), taking part in what of `features` is offered.
    fn restart(&mut self, features: u64) {
        // Device 1, function 0: the command register.
        self.bus.write(layout::ECAM + (8 << 12) + 4, &6u16.to_le_bytes());
        for status in [0, 1, 3] {
            self.write(20, &[status]);
        }
        for select in [0u32, 1] {
            self.write(0, &select.to_le_bytes());
            let mut offered = [0; 4];
            self.bus.read(BAR + 4, &mut offered);
            let wanted = u32::from_le_bytes(offered) & (features >> (32 * select)) as u32 | select;
            self.write(8, &select.to_le_bytes());
            self.write(12, &wanted.to_le_bytes());
        }
        self.write(20, &[11]);
        for queue in 0..self.queues {
            let base = u64::from(queue) * QUEUE_BYTES;
            self.write(22, &queue.to_le_bytes());
            self.write(24, &QUEUE_SIZE.to_le_bytes());
            for (register, address) in [(32, base), (40, base + AVAIL), (48, base + USED)] {
                self.write(register, &(address as u32).to_le_bytes());
                self.write(register + 4, &[0; 4]);
            }
            self.write(28, &1u16.to_le_bytes());
            self.memory.write_slice(&[0; 0x3000], GuestAddress(base)).expect("in memory");
        }
        self.write(20, &[15]);
        self.available = [0; 4];
    }

    fn step(&mut self, step: Step, outside: &mut dyn Outside) {
        match step {
            Step::Chain { queue, sound, buffers } => self.chain(self.queue(queue), sound, buffers, outside),
            Step::Memory { at, bytes } => {
                // What is not in memory is not written.
                let _ = self.memory.write_slice(&bytes, GuestAddress(u64::from(at) % (MEMORY + 4096)));
            }
            Step::Descriptor { queue, index, address, length, flags, next } => {
                let table = u64::from(self.queue(queue)) * QUEUE_BYTES;
                self.descriptor(table, u16::from(index) % QUEUE_SIZE, address, length, flags, next);
            }
            Step::Available { queue, index, head } => {
                let queue = self.queue(queue);
                self.offer(queue, head);
                self.set_available(queue, index);
            }
            Step::Register { config: true, write, offset, width, value } => {
                let offset = u64::from(offset % 4096);
                let width = 1 + usize::from(width) % (4 - (offset % 4) as usize);
                self.access(layout::ECAM + (8 << 12) + offset, write, &mut value.to_le_bytes()[..width]);
            }
            Step::Register { config: false, write, offset, width, value } => {
                let width = 1 + usize::from(width % 8);
                self.access(BAR + u64::from(offset % 0x8000), write, &mut value.to_le_bytes()[..width]);
            }
            Step::Restart { features } => self.restart(features),
            Step::Host(action) => outside.act(action),
        }
    }

    fn access(&mut self, address: u64, write: bool, data: &mut [u8]) {
        if write { self.bus.write(address, data) } else { self.bus.read(address, data) }
    }

    fn queue(&self, number: u8) -> u16 {
        u16::from(number) % self.queues
    }

    /// Makes a chain of `buffers` available.
    fn chain(&mut self, queue: u16, sound: bool, buffers: Vec<Buffer>, outside: &mut dyn Outside) {
        let base = u64::from(queue) * QUEUE_BYTES;
        let count = buffers.len().min(QUEUE_SIZE.into());
        let total = buffers[..count].iter().map(Buffer::readable).sum();
        let mut first = true;
        let head = self.available[usize::from(queue)] % QUEUE_SIZE;
        for (place, buffer) in buffers.into_iter().take(count).enumerate() {
            let index = (head + place as u16) % QUEUE_SIZE;
            let last = place + 1 == count;
            let mut put = |guest: &mut Self, mut bytes: Vec<u8>, length: u64| {
                if std::mem::take(&mut first) && sound {
                    outside.mend(&mut bytes, total);
                }
                let at = guest.place(length);
                let _ = guest.memory.write_slice(&bytes, GuestAddress(at));
                at
            };
            let (address, length, flags) = match buffer {
                Buffer::Readable(bytes) => {
                    let length = bytes.len() as u64;
                    (put(self, bytes, length), length as u32, 0)
                }
                Buffer::Long { bytes, length } => (put(self, bytes, length.into()), length.into(), 0),
                Buffer::Writable(length) => (self.place(length.into()), length.into(), 2),
                Buffer::Wild { address, length, writable } => (address, length, if writable { 2 } else { 0 }),
                // A table that is filled by other steps.
                Buffer::Indirect(entries) => (BUFFERS, u32::from(entries) * 16, 4),
            };
            let flags = if last || flags == 4 { flags } else { flags | 1 };
            self.descriptor(base, index, address, length, flags, (index + 1) % QUEUE_SIZE);
        }
        self.offer(queue, head);
        self.set_available(queue, self.available[usize::from(queue)].wrapping_add(1));
    }

    fn place(&mut self, length: u64) -> u64 {
        if self.free + length > MEMORY {
            self.free = BUFFERS;
        }
        let at = self.free;
        self.free += length;
        at
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).expect("in memory");
    }

    fn offer(&self, queue: u16, head: u16) {
        let slot = u64::from(self.available[usize::from(queue)] % QUEUE_SIZE);
        let at = u64::from(queue) * QUEUE_BYTES + AVAIL + 4 + 2 * slot;
        self.memory.write_slice(&head.to_le_bytes(), GuestAddress(at)).expect("in memory");
    }

    fn set_available(&mut self, queue: u16, index: u16) {
        self.available[usize::from(queue)] = index;
        let at = u64::from(queue) * QUEUE_BYTES + AVAIL + 2;
        self.memory.write_slice(&index.to_le_bytes(), GuestAddress(at)).expect("in memory");
        self.write(NOTIFY + 4 * u64::from(queue), &queue.to_le_bytes());
    }
}

impl Buffer {
    fn readable(&self) -> usize {
        match self {
            Self::Readable(bytes) => bytes.len(),
            Self::Long { length, .. } => usize::from(*length),
            Self::Writable(_) | Self::Wild { .. } | Self::Indirect(_) => 0,
        }
    }
}
