//! The worker of a network device.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::EventFlags;

use crate::devices::chain::Chain;
use crate::devices::queue::{DeviceQueue, Fault, Popped};
use crate::devices::sys::{self, Pieces};
use crate::devices::worker::{Handler, Poll};
use crate::jail::seccomp::Thread;
use crate::tap::VNET_HEADER_BYTES;

const RX: u64 = 0;
const TX: u64 = 1;
const TAP: u64 = 2;
/// Most bytes of a packet with its header: an IP packet of 64 KiB in an Ethernet frame with two VLAN tags.
const MAX_PACKET: usize = VNET_HEADER_BYTES + 22 + 65536;
/// Bytes of an Ethernet header, less than which no frame has.
const MIN_FRAME: usize = 14;
/// Most packets taken from the tap without a look at the other descriptors.
const BATCH: usize = 64;
/// Where in the header num_buffers is (5.1.6).
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// One of the guest's receive buffers.
#[derive(Default)]
struct Slot {
    head: u16,
    chain: Chain,
}

pub(super) struct NetWorker {
    rx: DeviceQueue,
    tx: DeviceQueue,
    tap: OwnedFd,
    /// A packet may take several receive buffers (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// The transmit chain at hand.
    chain: Chain,
    /// Receive buffers, of which the first `filled` wait for packets; the others' room is kept for use again.
    slots: Vec<Slot>,
    filled: usize,
    /// The packet on its way to the guest, and its bytes; 0 if there is none.
    packet: Vec<u8>,
    pending: usize,
    /// The tap is being watched. It is not while the guest has no buffers.
    watching: bool,
}

impl NetWorker {
    /// A worker that moves packets between `queues`, which are the receive and the transmit queue, and `tap`.
    pub fn new(queues: Vec<DeviceQueue>, tap: OwnedFd, mergeable: bool) -> io::Result<Self> {
        let Ok([rx, tx]) = <[DeviceQueue; 2]>::try_from(queues) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the driver did not enable both queues"));
        };
        Ok(Self {
            rx,
            tx,
            tap,
            mergeable,
            chain: Chain::default(),
            slots: Vec::new(),
            filled: 0,
            packet: vec![0; MAX_PACKET],
            pending: 0,
            watching: true,
        })
    }

    /// Sends the guest's packets.
    fn transmit(&mut self) -> Result<(), Fault> {
        let Self { tx, tap, chain, .. } = self;
        tx.serve(chain, |chain, memory| {
            let length = chain.readable.len();
            if (VNET_HEADER_BYTES + MIN_FRAME..=MAX_PACKET).contains(&length) {
                let pieces = Pieces::new(memory, &chain.readable, length);
                // A packet in too many pieces, or one that the tap does not take, is lost, as on any network: the tap checks
                // the header, and there is no way to tell the driver.
                if pieces.len() == length {
                    let _ = sys::write(tap.as_fd(), &pieces);
                }
            }
            Some(0)
        })
    }

    /// Gives packets to the guest until there is none, or no room.
    fn receive(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.rx.disable_notification()?;
        for _ in 0..BATCH {
            if self.pending == 0 {
                match rustix::io::read(&self.tap, &mut self.packet[..]) {
                    // No tap has an end; waiting for more would never end either.
                    Ok(0) => {
                        let source = io::ErrorKind::UnexpectedEof.into();
                        return Err(Fault::System { what: "the tap has ended", source });
                    }
                    Ok(length) if length < VNET_HEADER_BYTES + MIN_FRAME => continue,
                    Ok(length) => self.pending = length,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(errno) => return Err(Fault::System { what: "cannot read the tap", source: errno.into() }),
                }
            }
            if !self.deliver()? {
                self.watch(poll, false)?;
                break;
            }
            self.pending = 0;
        }
        self.rx.signal()
    }

    fn watch(&mut self, poll: &Poll, watch: bool) -> Result<(), Fault> {
        if self.watching != watch {
            let tap = self.tap.as_fd();
            let result = if watch { poll.add(tap, TAP, EventFlags::IN) } else { poll.remove(tap) };
            result.map_err(|source| Fault::System { what: "cannot watch the tap", source })?;
            self.watching = watch;
        }
        Ok(())
    }

    /// Puts the pending packet into receive buffers, or drops it if the guest's are too small. `false`: the guest has to add
    /// buffers first, and will notify.
    fn deliver(&mut self) -> Result<bool, Fault> {
        let most = if self.mergeable { usize::from(self.rx.size()) } else { 1 };
        let (mut room, mut count) = (0, 0);
        while room < self.pending {
            if count == most {
                return Ok(true);
            }
            if count == self.filled && !self.take_buffer()? {
                return Ok(false);
            }
            room += self.slots[count].chain.writable.len();
            count += 1;
        }
        // At most the size of a queue.
        self.packet[NUM_BUFFERS].copy_from_slice(&(count as u16).to_le_bytes());
        let mut rest = &self.packet[..self.pending];
        for Slot { head, chain } in &mut self.slots[..count] {
            let (now, later) = rest.split_at(rest.len().min(chain.writable.len()));
            // It is as long as the buffers are, which were validated.
            let _ = chain.writable.write(self.rx.memory(), now);
            self.rx.add_used(*head, now.len() as u32)?;
            rest = later;
        }
        self.slots[..self.filled].rotate_left(count);
        self.filled -= count;
        Ok(true)
    }

    /// Takes one more receive buffer from the queue. `false`: there is none, and the driver will notify.
    fn take_buffer(&mut self) -> Result<bool, Fault> {
        if self.slots.len() == self.filled {
            self.slots.push(Slot::default());
        }
        let slot = &mut self.slots[self.filled];
        for _ in 0..self.rx.size() {
            match self.rx.pop(&mut slot.chain)? {
                Popped::Chain(head) => {
                    slot.head = head;
                    self.filled += 1;
                    return Ok(true);
                }
                Popped::Malformed => {}
                Popped::Empty => {
                    if !self.rx.enable_notification()? {
                        return Ok(false);
                    }
                }
            }
        }
        // Nothing but malformed chains: the worker's other descriptors have their turn first.
        self.rx.notify_self()?;
        Ok(false)
    }
}

impl Handler for NetWorker {
    const THREAD: Thread = Thread::Net;

    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.rx.notify_fd(), RX, EventFlags::IN)?;
        poll.add(self.tx.notify_fd(), TX, EventFlags::IN)?;
        poll.add(self.tap.as_fd(), TAP, EventFlags::IN)?;
        self.tx.notify_self().map_err(io::Error::other)
    }

    fn ready(&mut self, poll: &Poll, token: u64, _events: EventFlags) -> Result<(), Fault> {
        match token {
            RX => {
                self.rx.clear_notification();
                if self.watching {
                    return Ok(());
                }
                self.watch(poll, true)?;
                self.receive(poll)
            }
            TX => {
                self.tx.clear_notification();
                self.transmit()
            }
            _ => self.receive(poll),
        }
    }

    fn idle(&mut self, _poll: &Poll) -> Result<Option<Duration>, Fault> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
