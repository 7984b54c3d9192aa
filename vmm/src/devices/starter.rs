//! The thread that starts the devices' workers, so that the vCPUs' need not: a thread hands its filter of system calls on to those
//! it starts, and would have to be allowed whatever they are.

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use crate::jail::seccomp::{self, Thread};

type Job = Box<dyn FnOnce() + Send>;

/// Starts threads for those that may not. Its own thread ends with it.
pub struct Starter {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Starter {
    /// Starts the thread, in a jail under its own filter.
    pub fn start() -> io::Result<Self> {
        let (jobs, queue) = sync_channel::<Job>(1);
        let thread = Builder::new().name("starter".to_owned()).stack_size(256 << 10).spawn(move || {
            seccomp::confine_started(Thread::Starter);
            queue.into_iter().for_each(|job| job());
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Calls `start` in the thread, and waits for what comes of it.
    pub(super) fn run<T: Send + 'static>(
        &self,
        start: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let gone = || io::Error::other("the thread that starts others is gone");
        let (answer, started) = sync_channel(1);
        // Nobody is gone who waits for the answer.
        let job = Box::new(move || drop(answer.send(start())));
        self.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        started.recv().map_err(|_| gone())?
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        self.jobs = None;
        // A thread that panicked has ended the process by the panic hook already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
