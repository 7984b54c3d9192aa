//! The driver's side of a queue, for the tests of devices.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Starter;
use crate::virtio::{Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice};

/// Descriptor flags (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Bytes of the memory of a test; buffers are taken from [`BUFFERS`] on.
pub const MEMORY: u64 = 16 << 20;
/// Where the tests' buffers begin.
pub const BUFFERS: u64 = 1 << 20;

pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

/// Counts interrupts.
pub struct TestInterrupt {
    queues: Vec<EventFd>,
    pub broken: EventFd,
}

impl Interrupt for TestInterrupt {
    fn signal_queue(&self, index: u16) -> io::Result<()> {
        self.queues[usize::from(index)].write(1)
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }

    fn device_needs_reset(&self) -> io::Result<()> {
        self.broken.write(1)
    }
}

/// A queue as the driver has it.
pub struct Driver {
    pub memory: GuestMemory,
    base: u64,
    pub size: u16,
    notify: EventFd,
    avail: u16,
    seen: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    interrupt: Arc<TestInterrupt>,
    index: u16,
}

/// Activates `device` with queues of `size` and returns the driver's side of them.
pub fn activate(device: &mut dyn VirtioDevice, memory: &GuestMemory, features: u64) -> Vec<Driver> {
    // Its worker is confined as in a jail: a system call that its list lacks kills the test.
    crate::jail::seccomp::prepare();
    let sizes = device.queue_sizes().to_vec();
    let interrupt = Arc::new(TestInterrupt {
        queues: sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
        broken: EventFd::new(EFD_NONBLOCK).unwrap(),
    });
    let (mut drivers, mut queues) = (Vec::new(), Vec::new());
    for (index, size) in sizes.into_iter().enumerate() {
        let index = index as u16;
        let base = u64::from(index) * 0x10000;
        memory.write_slice(&vec![0; 0x10000], GuestAddress(base)).unwrap();
        let mut queue = Queue::new(size).unwrap();
        queue.set_desc_table_address(Some(base as u32), Some(0));
        queue.set_avail_ring_address(Some(base as u32 + 0x4000), Some(0));
        queue.set_used_ring_address(Some(base as u32 + 0x8000), Some(0));
        queue.set_ready(true);
        let notify = EventFd::new(EFD_NONBLOCK).unwrap();
        queues.push(ActiveQueue { index, queue, notify: notify.try_clone().unwrap() });
        drivers.push(Driver {
            memory: memory.clone(),
            base,
            size,
            notify,
            avail: 0,
            seen: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            interrupt: Arc::clone(&interrupt),
            index,
        });
    }
    let interrupt = interrupt as Arc<dyn Interrupt>;
    let starter = Arc::new(Starter::start().unwrap());
    device.activate(Activation { memory: memory.clone(), features, queues, interrupt, starter }).unwrap();
    drivers
}

impl Driver {
    /// Writes one descriptor as it is.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.descriptor_at(self.base + 16 * u64::from(index), address, length, flags, next);
    }

    /// Writes one descriptor of an indirect table.
    pub fn descriptor_at(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        self.memory.write_obj(address.to_le(), GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes `head` available without looking at it.
    pub fn offer(&mut self, head: u16) {
        let slot = self.base + 0x4000 + 4 + 2 * u64::from(self.avail % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail(self.avail);
    }

    /// Sets the available index, right or wrong.
    pub fn set_avail(&self, index: u16) {
        self.memory.store(index, GuestAddress(self.base + 0x4002), std::sync::atomic::Ordering::SeqCst).unwrap();
    }

    /// Makes a chain of (address, length, writable) available; `None` if there is no room.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (place, (address, length, writable)) in buffers.iter().enumerate() {
            let next = indices.get(place + 1).copied();
            let flags = if *writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.descriptor(indices[place], *address, *length, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.offer(head);
        Some(head)
    }

    pub fn notify(&self) {
        self.notify.write(1).unwrap();
    }

    /// Takes one used chain: its head and the bytes written into it.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let used: u16 =
            self.memory.load(GuestAddress(self.base + 0x8002), std::sync::atomic::Ordering::SeqCst).unwrap();
        if used == self.seen {
            return None;
        }
        let slot = self.base + 0x8000 + 4 + 8 * u64::from(self.seen % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        // used_event: interrupt at the next chain.
        let event = self.base + 0x4000 + 4 + 2 * u64::from(self.size);
        self.memory.store(self.seen, GuestAddress(event), std::sync::atomic::Ordering::SeqCst).unwrap();
        self.free.extend(self.chains.remove(&(head as u16)).unwrap_or_default());
        Some((head as u16, length))
    }

    /// Waits up to 5 s for a used chain.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(self.wait_interrupt(deadline), "no interrupt came");
        }
    }

    fn wait_interrupt(&self, deadline: Instant) -> bool {
        let eventfd = &self.interrupt.queues[usize::from(self.index)];
        if wait_readable(eventfd, deadline) {
            eventfd.read().unwrap();
            return true;
        }
        false
    }

    /// Offers `buffers`, notifies and waits for the answer.
    pub fn request(&mut self, buffers: &[(u64, u32, bool)]) -> u32 {
        let head = self.add(buffers).expect("there is room");
        self.notify();
        let (used, length) = self.wait_used();
        assert_eq!(used, head);
        length
    }

    /// `true` if the device says within 5 s that it needs a reset.
    pub fn needs_reset(&self) -> bool {
        wait_readable(&self.interrupt.broken, Instant::now() + Duration::from_secs(5))
    }

    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

fn wait_readable(eventfd: &EventFd, deadline: Instant) -> bool {
    let fd = super::sys::borrow_eventfd(eventfd);
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}
