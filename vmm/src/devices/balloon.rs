//! The balloon device (virtio 1.2, section 5.5), for free page reporting alone: the guest tells which of its memory it does not use,
//! and the host takes the pages back until the guest touches them again. The balloon itself is never inflated.

use std::io;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::chain::Chain;
use super::queue::{DeviceQueue, Fault, RING_FEATURES};
use super::sys;
use super::worker::{FaultLog, Handler, Poll, Worker};
use crate::jail::seccomp::Thread;
use crate::virtio::{ActivateError, Activation, GuestMemory, VirtioDevice};

/// VIRTIO_BALLOON_F_REPORTING.
const REPORTING: u64 = 1 << 5;
/// The queue of the reports. The specification numbers it 4, behind two of features that are not offered here; Linux, which is what
/// guests run, counts the queues that there are.
const REPORTS: u16 = 2;
/// Those for inflating and deflating come before it.
const QUEUE_SIZES: &[u16] = &[32; 3];

/// The balloon device.
pub struct Balloon {
    worker: Option<Worker>,
    log: FaultLog,
}

impl Default for Balloon {
    /// A balloon without air.
    fn default() -> Self {
        Self { worker: None, log: FaultLog::new() }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_BALLOON as u16
    }

    fn name(&self) -> String {
        "balloon".to_owned()
    }

    fn features(&self) -> u64 {
        RING_FEATURES | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    /// struct virtio_balloon_config (5.5.4): no page is wanted, none is had.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (queues, launch) = DeviceQueue::take_over(activation);
        let worker = launch.worker("balloon", self.log.clone(), BalloonWorker { queues, chain: Chain::default() });
        self.worker = Some(worker.map_err(ActivateError::no_worker(self.name()))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct BalloonWorker {
    queues: Vec<DeviceQueue>,
    chain: Chain,
}

impl Handler for BalloonWorker {
    const THREAD: Thread = Thread::Balloon;

    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add_queues(&self.queues)
    }

    fn ready(&mut self, _poll: &Poll, token: u64, _events: EventFlags) -> Result<(), Fault> {
        let Some(queue) = usize::try_from(token).ok().and_then(|place| self.queues.get_mut(place)) else {
            return Ok(());
        };
        queue.clear_notification();
        let reports = queue.index() == REPORTS;
        queue.serve(&mut self.chain, |chain, memory| {
            if reports {
                discard(chain, memory);
            }
            Some(0)
        })
    }

    fn idle(&mut self, _poll: &Poll) -> Result<Option<Duration>, Fault> {
        Ok(None)
    }
}

/// Gives the pages in the chain's buffers back to the host. What it cannot take the guest keeps.
fn discard(chain: &Chain, memory: &GuestMemory) {
    for pages in chain.writable.slices(memory) {
        let _ = sys::discard(&pages);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::testing::{BUFFERS, activate, memory};

    #[test]
    fn what_is_reported_is_zeroes_afterwards_and_nothing_else_is() {
        let memory = memory();
        memory.write_slice(&[7; 5 * 4096], GuestAddress(BUFFERS)).unwrap();
        let mut balloon = Balloon::default();
        let mut drivers = activate(&mut balloon, &memory, 0);
        // One page whole, and of two others parts, which stay, as does the rest.
        let buffers = [(BUFFERS + 4096, 4096, true), (BUFFERS + 2 * 4096 + 1, 2 * 4096, true)];
        assert_eq!(drivers[2].request(&buffers), 0);
        let first_bytes: Vec<u8> = (0..5).map(|page| drivers[0].bytes(BUFFERS + page * 4096, 1)[0]).collect();
        assert_eq!(first_bytes, [7, 0, 7, 0, 7]);
        assert_eq!(drivers[0].bytes(BUFFERS + 4 * 4096 - 1, 2), [0, 7]);
    }

    #[test]
    fn pages_that_are_not_reported_stay() {
        let memory = memory();
        memory.write_slice(&[7; 4096], GuestAddress(BUFFERS)).unwrap();
        let mut balloon = Balloon::default();
        let mut drivers = activate(&mut balloon, &memory, 0);
        // Inflating, though nobody asked for it; and a report of what the device may only read.
        assert_eq!(drivers[0].request(&[(BUFFERS, 4096, false)]), 0);
        assert_eq!(drivers[2].request(&[(BUFFERS, 4096, false)]), 0);
        assert_eq!(drivers[0].bytes(BUFFERS, 4096), [7; 4096]);
    }
}
