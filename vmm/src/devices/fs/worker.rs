//! The worker of a file system device: requests out, replies in.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use isopod_proto::MAX_FUSE_MESSAGE;
use rustix::event::epoll::EventFlags;

use super::link::{Broken, Link};
use super::message::{REQUEST_HEADER, Reply, Request, failure};
use crate::devices::chain::{Buffers, Chain};
use crate::devices::queue::{DeviceQueue, Fault, Popped};
use crate::devices::worker::{Handler, Poll};
use crate::jail::seccomp::Thread;
use crate::virtio::GuestMemory;

/// Most chains taken without a look at the socket.
const BATCH: usize = 64;
/// The token of the socket; the queues have their positions.
const LINK: u64 = 1 << 32;

/// Requests that the server has not answered yet, by their numbers.
type Pending = HashMap<u64, Waiting>;

/// A request that waits for its reply, and the place for it.
struct Waiting {
    queue: usize,
    head: u16,
    chain: Chain,
}

pub(super) struct FsWorker {
    queues: Vec<DeviceQueue>,
    /// `None` once the server is lost.
    link: Option<Link>,
    /// At most as many as the queues have descriptors.
    pending: Pending,
    /// Chains to be filled again.
    spare: Vec<Chain>,
}

impl FsWorker {
    pub fn new(queues: Vec<DeviceQueue>, link: Option<Link>) -> Self {
        Self { queues, link, pending: HashMap::new(), spare: vec![] }
    }

    /// Takes requests from a queue, as many as the socket takes.
    fn take_requests(&mut self, index: usize) -> Result<(), Fault> {
        self.queues[index].disable_notification()?;
        for _ in 0..BATCH {
            if self.link.as_ref().is_some_and(|link| !link.is_free()) {
                // Gone on with when the socket has taken what is on its way.
                return self.queues[index].signal();
            }
            let mut chain = self.spare.pop().unwrap_or_default();
            match self.queues[index].pop(&mut chain)? {
                Popped::Chain(head) => self.forward(Waiting { queue: index, head, chain })?,
                Popped::Malformed => self.spare.push(chain),
                Popped::Empty => {
                    self.spare.push(chain);
                    if !self.queues[index].enable_notification()? {
                        return self.queues[index].signal();
                    }
                }
            }
        }
        // A bounded number, so that replies are not kept waiting; the others' turn is next.
        self.queues[index].notify_self()?;
        self.queues[index].signal()
    }

    /// Passes one request on. One that cannot be understood is given back unanswered: the guest has broken its own protocol.
    fn forward(&mut self, mut waiting: Waiting) -> Result<(), Fault> {
        let memory = self.queues[waiting.queue].memory().clone();
        let total = waiting.chain.readable.len();
        let mut header = [0; REQUEST_HEADER];
        let read = waiting.chain.readable.read(&memory, &mut header);
        let request = read.and_then(|()| Request::parse(&header, total));
        let Some(request) = request.filter(|request| !self.pending.contains_key(&request.unique)) else {
            return self.give_back(waiting, 0);
        };
        let Some(link) = &mut self.link else { return self.fail(waiting, request.unique, libc::ENOTCONN) };
        let buffer = link.buffer();
        buffer.extend_from_slice(&header);
        buffer.resize(total, 0);
        // Validated with the chain.
        waiting.chain.readable.read(&memory, &mut buffer[REQUEST_HEADER..]).expect("the length was looked at");
        let sent = link.send();
        if request.answered {
            self.pending.insert(request.unique, waiting);
        } else {
            self.give_back(waiting, 0)?;
        }
        sent.or_else(|Broken(error)| self.lose_server(&error))
    }

    fn give_back(&mut self, waiting: Waiting, written: u32) -> Result<(), Fault> {
        self.spare.push(waiting.chain);
        self.queues[waiting.queue].add_used(waiting.head, written)
    }

    /// Answers a request with an error of the device's own.
    fn fail(&mut self, mut waiting: Waiting, unique: u64, errno: i32) -> Result<(), Fault> {
        let memory = self.queues[waiting.queue].memory().clone();
        let written = write_reply(&mut waiting.chain.writable, &memory, unique, &failure(unique, errno));
        self.give_back(waiting, written)
    }

    /// Takes what the server has sent.
    fn take_replies(&mut self) -> Result<(), Fault> {
        let Some(mut link) = self.link.take() else { return Ok(()) };
        let mut fault = None;
        let received = link.send().and_then(|()| {
            link.receive(|Reply { unique, .. }, bytes| {
                let Some(mut waiting) = self.pending.remove(&unique) else { return Ok(false) };
                let memory = self.queues[waiting.queue].memory().clone();
                let written = write_reply(&mut waiting.chain.writable, &memory, unique, bytes);
                fault = self.give_back(waiting, written).err().or(fault.take());
                Ok(true)
            })
        });
        self.link = Some(link);
        if let Some(fault) = fault {
            return Err(fault);
        }
        received.or_else(|Broken(error)| self.lose_server(&error))
    }

    /// Answers all that waits; from now on everything is answered at once.
    fn lose_server(&mut self, error: &io::Error) -> Result<(), Fault> {
        // Once a device: the link is never made anew.
        eprintln!("isopod-vmm: a file system has lost its server: {error}");
        self.link = None;
        for (unique, waiting) in std::mem::take(&mut self.pending) {
            self.fail(waiting, unique, libc::ENOTCONN)?;
        }
        self.queues.iter_mut().try_for_each(DeviceQueue::signal)
    }
}

/// Puts a reply where there is room for it; otherwise EIO, and otherwise nothing. Returns the bytes written.
fn write_reply(place: &mut Buffers, memory: &GuestMemory, unique: u64, reply: &[u8]) -> u32 {
    debug_assert!(reply.len() <= MAX_FUSE_MESSAGE);
    if place.write(memory, reply).is_some() {
        return reply.len() as u32;
    }
    let failure = failure(unique, libc::EIO);
    place.write(memory, &failure).map_or(0, |()| failure.len() as u32)
}

impl Handler for FsWorker {
    const THREAD: Thread = Thread::FileSystem;

    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add_queues(&self.queues)?;
        if let Some(link) = &self.link {
            // By edges: it is read and written until it refuses.
            poll.add(rustix::fd::AsFd::as_fd(link), LINK, EventFlags::IN | EventFlags::OUT | EventFlags::ET)?;
        }
        Ok(())
    }

    fn ready(&mut self, _poll: &Poll, token: u64, _events: EventFlags) -> Result<(), Fault> {
        match usize::try_from(token).ok().filter(|index| *index < self.queues.len()) {
            Some(index) => {
                self.queues[index].clear_notification();
                self.take_requests(index)
            }
            None => {
                self.take_replies()?;
                (0..self.queues.len()).try_for_each(|index| self.take_requests(index))
            }
        }
    }

    fn idle(&mut self, _poll: &Poll) -> Result<Option<Duration>, Fault> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
