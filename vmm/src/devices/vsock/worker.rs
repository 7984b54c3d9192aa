//! The worker of the socket device: moves packets between the queues and the muxer.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::muxer::{Muxer, Token};
use super::packet::{HEADER_BYTES, Header, MAX_PAYLOAD};
use super::stream::Readiness;
use crate::devices::chain::Chain;
use crate::devices::queue::{DeviceQueue, Fault, Popped};
use crate::devices::worker::{Handler, Poll};
use crate::jail::seccomp::Thread;
use crate::virtio::GuestMemory;

const RX: Token = 0;
const TX: Token = 1;
const EVENT: Token = 2;
const LISTENER: Token = 3;
/// The tokens from here on are sockets'.
pub(super) const FIRST_SOCKET: Token = 16;
/// Most connections taken, and most packets sent, without a look at the other descriptors.
const BATCH: usize = 64;
/// How long nothing is accepted after it failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct VsockWorker {
    pub rx: DeviceQueue,
    pub tx: DeviceQueue,
    /// Never used: it tells of a changed context id, which is not changed while a VM lives.
    pub event: Option<DeviceQueue>,
    pub listener: UnixListener,
    /// When to accept again, after there were no descriptors left to do so.
    pub accept_again: Option<Instant>,
    pub muxer: Muxer<UnixStream>,
    pub chain: Chain,
    /// The data of one packet; [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

impl Handler for VsockWorker {
    const THREAD: Thread = Thread::Vsock;

    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.rx.notify_fd(), RX, EventFlags::IN)?;
        poll.add(self.tx.notify_fd(), TX, EventFlags::IN)?;
        if let Some(event) = &self.event {
            poll.add(event.notify_fd(), EVENT, EventFlags::IN)?;
        }
        poll.add(self.listener.as_fd(), LISTENER, EventFlags::IN)?;
        self.tx.notify_self().map_err(io::Error::other)
    }

    fn ready(&mut self, poll: &Poll, token: u64, events: EventFlags) -> Result<(), Fault> {
        match token {
            // Buffers for the guest: what waits for them is sent when all events have been told.
            RX => self.rx.clear_notification(),
            TX => {
                self.tx.clear_notification();
                self.receive_packets()?;
            }
            EVENT => {
                if let Some(event) = &self.event {
                    event.clear_notification();
                }
            }
            LISTENER => self.accept(poll)?,
            socket => {
                let readiness = Readiness {
                    readable: events.contains(EventFlags::IN),
                    writable: events.contains(EventFlags::OUT),
                    ended: events.contains(EventFlags::RDHUP),
                    closed: events.intersects(EventFlags::HUP | EventFlags::ERR),
                };
                self.muxer.host_ready(socket, readiness, Instant::now());
            }
        }
        Ok(())
    }

    fn idle(&mut self, poll: &Poll) -> Result<Option<Duration>, Fault> {
        let now = Instant::now();
        self.resume_accepting(poll, now)?;
        self.muxer.expire(now);
        self.send_packets(now)?;
        let next = [self.muxer.next_tick(), self.accept_again].into_iter().flatten().min();
        Ok(next.map(|tick| tick.saturating_duration_since(now)))
    }
}

impl VsockWorker {
    fn accept(&mut self, poll: &Poll) -> Result<(), Fault> {
        for _ in 0..BATCH {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                // Out of descriptors or memory. It stays readable, so that watching on would be spinning.
                Err(_) => return self.pause_accepting(poll),
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let Some(token) = self.muxer.add(stream, Instant::now()) else { continue };
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            if let Some(stream) = self.muxer.stream(token) {
                // What is ready already is told as well: adding a descriptor reports its state once.
                poll.add(stream.as_fd(), token, flags)
                    .map_err(|source| Fault::System { what: "cannot watch a connection", source })?;
            }
        }
        Ok(())
    }

    fn pause_accepting(&mut self, poll: &Poll) -> Result<(), Fault> {
        let failed = |source| Fault::System { what: "cannot stop watching the listening socket", source };
        poll.remove(self.listener.as_fd()).map_err(failed)?;
        self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
        Ok(())
    }

    fn resume_accepting(&mut self, poll: &Poll, now: Instant) -> Result<(), Fault> {
        if self.accept_again.is_some_and(|time| time <= now) {
            let failed = |source| Fault::System { what: "cannot watch the listening socket", source };
            poll.add(self.listener.as_fd(), LISTENER, EventFlags::IN).map_err(failed)?;
            self.accept_again = None;
        }
        Ok(())
    }

    /// Takes packets from the guest.
    fn receive_packets(&mut self) -> Result<(), Fault> {
        let Self { tx, chain, muxer, payload, .. } = self;
        let now = Instant::now();
        tx.serve(chain, |chain, memory| {
            receive(chain, memory, muxer, payload, now);
            Some(0)
        })
    }

    /// Gives packets to the guest, as long as it has buffers for them.
    fn send_packets(&mut self, now: Instant) -> Result<(), Fault> {
        let mut left = BATCH;
        while self.muxer.has_packets() {
            if left == 0 {
                self.rx.notify_self()?;
                break;
            }
            left -= 1;
            let head = match self.rx.pop(&mut self.chain)? {
                Popped::Chain(head) => head,
                Popped::Malformed => continue,
                // Wait for buffers, unless some came just now.
                Popped::Empty if self.rx.enable_notification()? => continue,
                Popped::Empty => break,
            };
            let Some(room) = self.chain.writable.len().checked_sub(HEADER_BYTES) else {
                self.rx.add_used(head, 0)?;
                continue;
            };
            let payload = &mut self.payload[..room.min(MAX_PAYLOAD)];
            let Some(header) = self.muxer.next_packet(payload, now) else {
                self.rx.unpop();
                break;
            };
            let memory = self.rx.memory();
            let data = &payload[..header.len as usize];
            // There is room for both, as was checked.
            let _ = self.chain.writable.write(memory, &header.encode());
            let _ = self.chain.writable.write(memory, data);
            self.rx.add_used(head, HEADER_BYTES as u32 + header.len)?;
        }
        self.rx.signal()
    }
}

/// Gives the packet in `chain` to the muxer.
fn receive(chain: &mut Chain, memory: &GuestMemory, muxer: &mut Muxer<UnixStream>, payload: &mut [u8], now: Instant) {
    let mut header = [0; HEADER_BYTES];
    // Without a header there is nobody to answer to.
    let Some(()) = chain.readable.read(memory, &mut header) else { return };
    let header = Header::parse(&header);
    let data = payload.get_mut(..header.len as usize);
    match data.and_then(|data| chain.readable.read(memory, data).map(|()| data)) {
        Some(data) => muxer.guest_packet(&header, data, now),
        None => muxer.malformed_packet(&header),
    }
}
