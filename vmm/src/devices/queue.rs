//! A virtqueue in the hands of a device's worker.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::chain::Chain;
use super::worker::Launch;
use crate::virtio::{Activation, ActiveQueue, GuestMemory, Interrupt};

/// Most chains served without a look at the worker's other descriptors.
const BATCH: u16 = 32;

/// Feature bits of the rings, which every device offers.
pub(super) const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Why a device cannot go on: the guest broke a ring, or the host refused something it must not refuse.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// The ring's own memory or indices are wrong.
    #[error("queue {index}: {what}")]
    Ring {
        index: u16,
        what: &'static str,
        #[source]
        source: virtio_queue::Error,
    },
    /// A system call of the device's own failed.
    #[error("{what}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

/// What was at the front of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Popped {
    /// A valid chain, of this head.
    Chain(u16),
    /// One that was given back. A guest can make as many as it likes: the caller counts them.
    Malformed,
    /// Nothing.
    Empty,
}

/// One queue, the memory it is in, and its interrupt.
pub(super) struct DeviceQueue {
    index: u16,
    queue: Queue,
    notify: EventFd,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// Chains were given back since the driver was last interrupted, or found not to want to be.
    unsignalled: bool,
}

impl DeviceQueue {
    /// Takes over all queues of a device, and gives them with what starts their worker.
    pub fn take_over(activation: Activation) -> (Vec<Self>, Launch) {
        let Activation { memory, features, queues, interrupt, starter } = activation;
        let queues = queues.into_iter().map(|queue| Self::new(queue, features, &memory, &interrupt)).collect();
        (queues, Launch { interrupt, starter })
    }

    /// Takes over a queue the driver has set up. `features` are those agreed on.
    pub fn new(active: ActiveQueue, features: u64, memory: &GuestMemory, interrupt: &Arc<dyn Interrupt>) -> Self {
        let ActiveQueue { index, mut queue, notify } = active;
        queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        Self { index, queue, notify, memory: memory.clone(), interrupt: Arc::clone(interrupt), unsignalled: false }
    }

    /// Readable when the driver has notified the device.
    pub fn notify_fd(&self) -> BorrowedFd<'_> {
        super::sys::borrow_eventfd(&self.notify)
    }

    /// Makes the worker look at the queue as if the driver had notified it.
    pub fn notify_self(&self) -> Result<(), Fault> {
        self.notify.write(1).map_err(|source| Fault::System { what: "cannot notify the device's own queue", source })
    }

    /// Forgets the driver's notification.
    pub fn clear_notification(&self) {
        debug_assert!(self.notify.as_raw_fd() >= 0);
        // It is readable when this is called; were it not, there would be nothing to forget.
        let _ = self.notify.read();
    }

    /// Position among the device's queues.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Most chains a driver has in the queue at a time.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The memory the queue is in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn ring(&self, what: &'static str) -> impl FnOnce(virtio_queue::Error) -> Fault + use<> {
        let index = self.index;
        move |source| Fault::Ring { index, what, source }
    }

    /// Takes the next chain into `chain`. One that is malformed is given back unused, as there is no place in it to say so.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Popped, Fault> {
        let failed = self.ring("the available ring cannot be read");
        let Some(descriptors) = self.queue.iter(&self.memory).map_err(failed)?.next() else { return Ok(Popped::Empty) };
        let head = descriptors.head_index();
        if chain.fill(descriptors).is_ok() {
            return Ok(Popped::Chain(head));
        }
        self.add_used(head, 0)?;
        Ok(Popped::Malformed)
    }

    /// Puts the chain taken last back, to be taken again. Only before [`DeviceQueue::add_used`] was called for it.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives the chain `head` back with `written` bytes written into it.
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), Fault> {
        let failed = self.ring("the used ring cannot be written");
        self.unsignalled = true;
        self.queue.add_used(&self.memory, head, written).map_err(failed)
    }

    /// Interrupts the guest if chains were given back and the driver wants to know.
    pub fn signal(&mut self) -> Result<(), Fault> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(());
        }
        let failed = self.ring("the driver's event index cannot be read");
        if self.queue.needs_notification(&self.memory).map_err(failed)? {
            let failed = |source| Fault::System { what: "cannot interrupt the guest", source };
            self.interrupt.signal_queue(self.index).map_err(failed)?;
        }
        Ok(())
    }

    /// Asks for notifications again. `true`: chains have come in the meantime, and must be looked at now.
    pub fn enable_notification(&mut self) -> Result<bool, Fault> {
        let failed = self.ring("notifications cannot be enabled");
        self.queue.enable_notification(&self.memory).map_err(failed)
    }

    /// Asks not to be notified while the queue is being worked on.
    pub fn disable_notification(&mut self) -> Result<(), Fault> {
        let failed = self.ring("notifications cannot be disabled");
        self.queue.disable_notification(&self.memory).map_err(failed)
    }

    /// Calls `each` for the chains in the queue and gives each back with the number of written bytes it returns; `None`
    /// ends it, with that chain left in the queue. At most [`BATCH`] at once: with more, the worker is notified again.
    pub fn serve(
        &mut self,
        chain: &mut Chain,
        mut each: impl FnMut(&mut Chain, &GuestMemory) -> Option<u32>,
    ) -> Result<(), Fault> {
        // A bounded number, so that a reset does not wait long for the worker.
        self.disable_notification()?;
        for _ in 0..BATCH {
            match self.pop(chain)? {
                Popped::Chain(head) => match each(chain, &self.memory) {
                    Some(written) => self.add_used(head, written)?,
                    None => {
                        self.unpop();
                        return self.signal();
                    }
                },
                Popped::Malformed => {}
                Popped::Empty => {
                    if !self.enable_notification()? {
                        return self.signal();
                    }
                }
            }
        }
        // A bounded number, so that a reset does not wait long for the worker; the others' turn is next.
        self.notify_self()?;
        self.signal()
    }
}
