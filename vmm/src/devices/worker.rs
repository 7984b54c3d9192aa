//! The thread a device runs in: an epoll loop that ends when it is told to, or when the device cannot go on.

use std::error::Error as _;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use super::queue::{DeviceQueue, Fault};
use super::starter::Starter;
use crate::jail::seccomp::{self, Thread};
use crate::virtio::Interrupt;

/// The token of the descriptor that ends the loop.
const STOP: u64 = u64::MAX;
/// Events taken at once.
const BATCH: usize = 64;

/// What a worker waits for.
pub(super) struct Poll {
    epoll: OwnedFd,
}

impl Poll {
    /// Waits for `events` on `fd` too, which are then told with `token`.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), events)?)
    }

    /// Waits for the notifications of `queues`, each with its place among them as token. Chains that are in them already are found as
    /// well: each is notified once.
    pub fn add_queues(&self, queues: &[DeviceQueue]) -> io::Result<()> {
        for (token, queue) in (0..).zip(queues) {
            self.add(queue.notify_fd(), token, EventFlags::IN)?;
            queue.notify_self().map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Waits no longer for `fd`.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }
}

/// What a device does in its worker.
pub(super) trait Handler: Send + 'static {
    /// What its thread may do.
    const THREAD: Thread;
    /// Registers its descriptors. Chains that are in its queues already must be found as well.
    fn register(&mut self, poll: &Poll) -> io::Result<()>;
    /// `events` have come on the descriptor of `token`.
    fn ready(&mut self, poll: &Poll, token: u64, events: EventFlags) -> Result<(), Fault>;
    /// All events at hand have been told. Returns how long to wait for more at most.
    fn idle(&mut self, poll: &Poll) -> Result<Option<Duration>, Fault>;
}

/// How many more faults of one device are logged: a guest can cause as many as it likes.
#[derive(Debug, Clone)]
pub(super) struct FaultLog(Arc<AtomicU32>);

impl FaultLog {
    pub fn new() -> Self {
        Self(Arc::new(AtomicU32::new(8)))
    }

    fn log(&self, name: &str, fault: &Fault) {
        if self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            let cause = fault.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            eprintln!("isopod-vmm: the {name} device stops: {fault}{cause}");
        }
    }
}

/// A running worker. Dropping it stops and joins it.
pub(super) struct Worker {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// What a worker is started with.
pub(super) struct Launch {
    /// Is told when the worker cannot go on.
    pub interrupt: Arc<dyn Interrupt>,
    /// Starts the thread.
    pub starter: Arc<Starter>,
}

impl Launch {
    /// Starts `handler` in a thread called `name`.
    pub fn worker<H: Handler>(self, name: &str, log: FaultLog, handler: H) -> io::Result<Worker> {
        let Self { interrupt, starter } = self;
        // Always, which the compiler is not to know: without threads much of this file would be unused.
        #[cfg(feature = "fuzzing")]
        if std::hint::black_box(true) {
            return inline::start(interrupt, handler);
        }
        let name = name.to_owned();
        starter.run(move || spawn(name, interrupt, log, handler))
    }
}

fn spawn<H: Handler>(name: String, interrupt: Arc<dyn Interrupt>, log: FaultLog, mut handler: H) -> io::Result<Worker> {
    let (poll, stop) = prepare(&mut handler)?;
    let thread = Builder::new().name(name.clone()).spawn(move || {
        seccomp::confine_started(H::THREAD);
        if let Err(fault) = run(&poll, &mut handler) {
            log.log(&name, &fault);
            // Should it fail, the driver sees only that nothing is answered any more.
            let _ = interrupt.device_needs_reset();
        }
    })?;
    Ok(Worker { stop, thread: Some(thread) })
}

/// What `handler` waits for, and what ends it when it is written.
fn prepare(handler: &mut impl Handler) -> io::Result<(Poll, OwnedFd)> {
    let poll = Poll { epoll: epoll::create(CreateFlags::CLOEXEC)? };
    let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    poll.add(stop.as_fd(), STOP, EventFlags::IN)?;
    handler.register(&poll)?;
    Ok((poll, stop))
}

impl Drop for Worker {
    fn drop(&mut self) {
        #[cfg(feature = "fuzzing")]
        inline::stop();
        let Some(thread) = self.thread.take() else { return };
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).expect("an eventfd that is written once takes a write");
        // A worker that panicked has ended, which is all that is wanted here; the panic hook has told of it.
        let _ = thread.join();
    }
}

/// In place of the thread, for the fuzzer: the worker started last runs when it is told to, in the thread that tells it.
#[cfg(feature = "fuzzing")]
pub(crate) mod inline {
    use std::cell::RefCell;

    use super::*;

    /// Turns at once; a guest can keep a worker busy for as long as it likes.
    const TURNS: usize = 32;

    thread_local! {
        static RUNNING: RefCell<Option<Box<dyn FnMut() -> bool>>> = const { RefCell::new(None) };
    }

    pub(super) fn start<H: Handler>(interrupt: Arc<dyn Interrupt>, mut handler: H) -> io::Result<Worker> {
        let (poll, stop) = prepare(&mut handler)?;
        let mut events = Vec::with_capacity(BATCH);
        let mut turns = move || -> Result<(), Fault> {
            for _ in 0..TURNS {
                if turn(&poll, &mut handler, &mut events, Some(Duration::ZERO))?.is_break() || events.is_empty() {
                    break;
                }
            }
            Ok(())
        };
        let run =
            move || turns().or_else(|_| interrupt.device_needs_reset().and(Err(io::Error::other("fault")))).is_ok();
        RUNNING.set(Some(Box::new(run)));
        Ok(Worker { stop, thread: None })
    }

    pub(super) fn stop() {
        RUNNING.take();
    }

    /// Lets the worker do what there is to do.
    pub(crate) fn run() {
        let Some(mut worker) = RUNNING.take() else { return };
        if worker() {
            RUNNING.set(Some(worker));
        }
    }
}

fn run(poll: &Poll, handler: &mut impl Handler) -> Result<(), Fault> {
    let mut events = Vec::with_capacity(BATCH);
    while turn(poll, handler, &mut events, None)?.is_continue() {}
    Ok(())
}

/// Waits for events, no longer than `most`, and handles them. They are left in `events`.
fn turn(
    poll: &Poll,
    handler: &mut impl Handler,
    events: &mut Vec<Event>,
    most: Option<Duration>,
) -> Result<ControlFlow<()>, Fault> {
    let wait = handler.idle(poll)?;
    let timeout = most
        .or(wait)
        .map(|wait| Timespec { tv_sec: wait.as_secs().min(3600) as i64, tv_nsec: wait.subsec_nanos().into() });
    events.clear();
    match epoll::wait(&poll.epoll, spare_capacity(events), timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(Fault::System { what: "cannot wait for events", source: errno.into() }),
    }
    for event in &*events {
        let (token, flags) = (event.data.u64(), event.flags);
        if token == STOP {
            return Ok(ControlFlow::Break(()));
        }
        handler.ready(poll, token, flags)?;
    }
    Ok(ControlFlow::Continue(()))
}
