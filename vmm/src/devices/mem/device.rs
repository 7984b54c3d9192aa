//! The device: configuration space, and the worker that answers the driver's requests.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ErrorKind;
use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use super::Backing;
use super::blocks::{self, BLOCK_BYTES, Blocks, Refusal, State};
use super::request::{REQUEST_BYTES, Request, Response};
use crate::devices::chain::Chain;
use crate::devices::queue::{DeviceQueue, Fault, RING_FEATURES};
use crate::devices::worker::{FaultLog, Handler, Poll, Worker};
use crate::jail::seccomp::Thread;
use crate::virtio::{ActivateError, Activation, GuestMemory, Interrupt, VirtioDevice};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: what the guest does not have it cannot even read (5.15.3).
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const QUEUE_SIZES: &[u16] = &[64];

/// A size that the guest cannot be asked to have.
#[derive(Debug, thiserror::Error)]
#[error("{bytes} bytes are not a multiple of {BLOCK_BYTES} up to {most}")]
pub struct MemError {
    /// What was to be requested.
    pub bytes: u64,
    /// The whole range.
    pub most: u64,
}

impl MemError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

struct Shared {
    state: Mutex<Shown>,
    backing: Box<dyn Backing>,
}

/// What the driver sees in configuration space, and how it learns that it has changed.
struct Shown {
    blocks: Blocks,
    generation: u8,
    /// While the device is active.
    interrupt: Option<Arc<dyn Interrupt>>,
}

/// The memory device.
pub struct Mem {
    shared: Arc<Shared>,
    worker: Option<Worker>,
    log: FaultLog,
}

/// Says how much memory the guest is to have, and finds out how much it has.
#[derive(Clone)]
pub struct MemControl(Arc<Shared>);

impl Mem {
    /// A device for `length` bytes at guest-physical `start`, both multiples of [`BLOCK_BYTES`], of which the guest has none yet.
    pub fn new(start: u64, length: u64, backing: Box<dyn Backing>) -> Self {
        let shown = Shown { blocks: Blocks::new(start, length), generation: 0, interrupt: None };
        Self { shared: Arc::new(Shared { state: Mutex::new(shown), backing }), worker: None, log: FaultLog::new() }
    }

    /// The other side of the device.
    pub fn control(&self) -> MemControl {
        MemControl(Arc::clone(&self.shared))
    }
}

impl MemControl {
    /// Asks the guest to have `bytes` of the range, and returns at once.
    pub fn request(&self, bytes: u64) -> Result<(), MemError> {
        let interrupt = {
            let mut shown = self.0.state.lock();
            let most = shown.blocks.length();
            shown.blocks.request(bytes).ok_or(MemError { bytes, most })?;
            shown.generation = shown.generation.wrapping_add(1);
            shown.interrupt.clone()
        };
        if let Some(interrupt) = interrupt {
            // Should it fail, the driver finds the new size when it looks the next time.
            let _ = interrupt.signal_config();
        }
        Ok(())
    }

    /// Bytes of the range that the guest has.
    pub fn plugged_bytes(&self) -> u64 {
        self.0.state.lock().blocks.plugged_bytes()
    }

    /// Bytes of the range.
    pub fn most_bytes(&self) -> u64 {
        self.0.state.lock().blocks.length()
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_MEM as u16
    }

    fn name(&self) -> String {
        "mem".to_owned()
    }

    fn features(&self) -> u64 {
        RING_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    /// struct virtio_mem_config (5.15.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shown = self.shared.state.lock();
        let (length, node) = (shown.blocks.length(), 0u64);
        let fields = [
            BLOCK_BYTES,
            node,
            shown.blocks.start(),
            length,
            // All of the range may be used, wherever the driver likes.
            length,
            shown.blocks.plugged_bytes(),
            shown.blocks.requested_bytes(),
        ];
        let config: Vec<u8> = fields.into_iter().flat_map(u64::to_le_bytes).collect();
        crate::devices::read_config(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn config_generation(&self) -> u8 {
        self.shared.state.lock().generation
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.shared.state.lock().interrupt = Some(Arc::clone(&activation.interrupt));
        let (queues, launch) = DeviceQueue::take_over(activation);
        let handler = MemWorker { queues, chain: Chain::default(), shared: Arc::clone(&self.shared) };
        let worker = launch.worker("mem", self.log.clone(), handler);
        self.worker = Some(worker.map_err(ActivateError::no_worker(self.name()))?);
        Ok(())
    }

    /// What the guest has it keeps: a reset is no unplug (5.15.5).
    fn reset(&mut self) {
        self.worker = None;
        self.shared.state.lock().interrupt = None;
    }
}

struct MemWorker {
    /// One, or none if the driver enabled none.
    queues: Vec<DeviceQueue>,
    chain: Chain,
    shared: Arc<Shared>,
}

impl Handler for MemWorker {
    const THREAD: Thread = Thread::Mem;

    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add_queues(&self.queues)
    }

    fn ready(&mut self, _poll: &Poll, _token: u64, _events: EventFlags) -> Result<(), Fault> {
        let shared = &self.shared;
        for queue in &mut self.queues {
            queue.clear_notification();
            queue.serve(&mut self.chain, |chain, memory| Some(shared.serve(chain, memory)))?;
        }
        Ok(())
    }

    fn idle(&mut self, _poll: &Poll) -> Result<Option<Duration>, Fault> {
        Ok(None)
    }
}

impl Shared {
    /// Answers one request, and returns how many bytes were written: none where there is no room for an answer.
    fn serve(&self, chain: &mut Chain, memory: &GuestMemory) -> u32 {
        let mut bytes = [0; REQUEST_BYTES];
        let request = chain.readable.read(memory, &mut bytes).and_then(|()| Request::parse(&bytes));
        let response = request.map_or(Response::Error, |request| self.answer(request)).to_bytes();
        chain.writable.write(memory, &response).map_or(0, |()| response.len() as u32)
    }

    fn answer(&self, request: Request) -> Response {
        let mut shown = self.state.lock();
        let done = match request {
            Request::Set { to, address, count } => shown
                .blocks
                .find(address, count)
                .map_err(Response::from)
                .and_then(|range| self.set(&mut shown, range, to)),
            Request::UnplugAll => {
                let mut runs = shown.blocks.runs().into_iter();
                runs.try_for_each(|run| self.set(&mut shown, run, State::Unplugged))
            }
            Request::State { address, count } => {
                return shown
                    .blocks
                    .find(address, count)
                    .map_or_else(Response::from, |range| Response::State(shown.blocks.state(range)));
            }
        };
        shown.generation = shown.generation.wrapping_add(1);
        done.map_or_else(|response| response, |()| Response::Ack)
    }

    /// Gives these blocks, or takes them.
    fn set(&self, shown: &mut Shown, range: Range<usize>, to: State) -> Result<(), Response> {
        shown.blocks.check(&range, to)?;
        let (offset, length) = blocks::bytes(&range);
        let done = match to {
            State::Plugged => self.backing.give(offset, length),
            State::Unplugged | State::Mixed => self.backing.take(offset, length),
        };
        done.map_err(|_| Response::Busy)?;
        shown.blocks.set(range, to);
        Ok(())
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Nack => Self::Nack,
            Refusal::Error => Self::Error,
        }
    }
}
