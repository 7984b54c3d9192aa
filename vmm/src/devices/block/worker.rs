//! The worker of a block device.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::EventFlags;

use super::request::Target;
use crate::devices::chain::Chain;
use crate::devices::queue::{DeviceQueue, Fault};
use crate::devices::worker::{Handler, Poll};
use crate::jail::seccomp::Thread;

pub(super) struct BlockWorker {
    /// One, or none if the driver enabled none.
    pub queues: Vec<DeviceQueue>,
    pub target: Arc<Target>,
    pub chain: Chain,
}

impl Handler for BlockWorker {
    const THREAD: Thread = Thread::Block;

    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add_queues(&self.queues)
    }

    fn ready(&mut self, _poll: &Poll, _token: u64, _events: EventFlags) -> Result<(), Fault> {
        for queue in &mut self.queues {
            queue.clear_notification();
            queue.serve(&mut self.chain, |chain, memory| Some(self.target.serve(chain, memory)))?;
        }
        Ok(())
    }

    fn idle(&mut self, _poll: &Poll) -> Result<Option<Duration>, Fault> {
        Ok(None)
    }
}
