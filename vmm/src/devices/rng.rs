//! The entropy device (virtio 1.2, section 5.4): the host's random numbers for the guest.

use std::io;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::chain::Chain;
use super::queue::{DeviceQueue, Fault, RING_FEATURES};
use super::worker::{FaultLog, Handler, Poll, Worker};
use crate::jail::seccomp::Thread;
use crate::virtio::{ActivateError, Activation, GuestMemory, VirtioDevice};

/// Most bytes one request gets, so that none keeps the worker for long.
const MAX_BYTES: usize = 64 * 1024;
const QUEUE_SIZES: &[u16] = &[64];

/// Why a [`Rng`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The host has no random numbers.
    #[error("the host gives no random numbers")]
    NoEntropy(#[source] io::Error),
}

impl RngError {
    /// What sort of failure it is.
    pub fn kind(&self) -> isopod_proto::ErrorKind {
        match self {
            Self::NoEntropy(_) => isopod_proto::ErrorKind::Internal,
        }
    }
}

/// The entropy device.
pub struct Rng {
    worker: Option<Worker>,
    log: FaultLog,
}

impl Rng {
    /// Checks that the host has random numbers to give.
    pub fn new() -> Result<Self, RngError> {
        random(&mut [0; 8]).map_err(RngError::NoEntropy)?;
        Ok(Self { worker: None, log: FaultLog::new() })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn name(&self) -> String {
        "rng".to_owned()
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (queues, launch) = DeviceQueue::take_over(activation);
        let handler = RngWorker { queues, chain: Chain::default() };
        let worker = launch.worker("rng", self.log.clone(), handler);
        self.worker = Some(worker.map_err(ActivateError::no_worker(self.name()))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct RngWorker {
    /// One, or none if the driver enabled none.
    queues: Vec<DeviceQueue>,
    chain: Chain,
}

impl Handler for RngWorker {
    const THREAD: Thread = Thread::Rng;

    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add_queues(&self.queues)
    }

    fn ready(&mut self, _poll: &Poll, _token: u64, _events: EventFlags) -> Result<(), Fault> {
        for queue in &mut self.queues {
            queue.clear_notification();
            let mut failure = None;
            queue.serve(&mut self.chain, |chain, memory| match fill(chain, memory) {
                Ok(written) => Some(written),
                Err(source) => {
                    failure = Some(source);
                    None
                }
            })?;
            if let Some(source) = failure {
                return Err(Fault::System { what: "cannot get random numbers", source });
            }
        }
        Ok(())
    }

    fn idle(&mut self, _poll: &Poll) -> Result<Option<Duration>, Fault> {
        Ok(None)
    }
}

/// Fills the buffers of `chain`, up to [`MAX_BYTES`], and returns how many bytes it wrote.
fn fill(chain: &mut Chain, memory: &GuestMemory) -> io::Result<u32> {
    let mut bytes = [0; 4096];
    let total = chain.writable.len().min(MAX_BYTES);
    let mut left = total;
    while left > 0 {
        let now = &mut bytes[..left.min(4096)];
        random(now)?;
        chain.writable.write(memory, now).ok_or(io::ErrorKind::UnexpectedEof)?;
        left -= now.len();
    }
    Ok(total as u32)
}

/// Fills `bytes` from the host's generator.
fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
