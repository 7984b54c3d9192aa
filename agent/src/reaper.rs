//! Process 1 reaps every child, its own and the orphans it inherits, and tells whoever watches one how it ended.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::process::{Pid, PidfdFlags, WaitOptions, WaitStatus};
use rustix::time::{ClockId, clock_gettime};
use tokio::signal::unix::Signal;
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + N for a process killed by signal N.
    pub code: i32,
    /// The signal that killed it, or 0.
    pub signal: u32,
    /// CLOCK_REALTIME when it was reaped, in nanoseconds.
    pub finished_at_nanos: i64,
}

/// A child that is watched.
#[derive(Debug)]
pub struct Watched {
    /// Refers to the process; absent if it had already ended.
    pub pidfd: Option<OwnedFd>,
    /// Gets its end.
    pub exit: oneshot::Receiver<Exit>,
}

#[derive(Default)]
struct State {
    watched: HashMap<i32, oneshot::Sender<Exit>>,
    /// Ends of children nobody watches yet, kept only while a launch is under way whose child they may be of.
    unclaimed: HashMap<i32, Exit>,
    launches: usize,
}

/// The table of watched children. Its lock is held while children are reaped, so a process id is not used again under
/// somebody who holds it.
#[derive(Default)]
pub struct Reaper {
    state: Mutex<State>,
}

/// While one exists, the ends of unknown children are kept.
pub struct LaunchGuard {
    reaper: Arc<Reaper>,
}

impl Drop for LaunchGuard {
    fn drop(&mut self) {
        let mut state = self.reaper.state.lock();
        state.launches -= 1;
        if state.launches == 0 {
            state.unclaimed.clear();
        }
    }
}

impl Reaper {
    /// Announces that a child will come to be whose process id is not known at once.
    pub fn begin_launch(self: &Arc<Self>) -> LaunchGuard {
        self.state.lock().launches += 1;
        LaunchGuard { reaper: Arc::clone(self) }
    }

    /// Starts `command` and leaves it to the reaper. The lock keeps the child from being reaped inside `spawn`, which waits
    /// for it itself if it cannot be executed.
    pub fn spawn(&self, command: &mut Command) -> io::Result<()> {
        let _state = self.state.lock();
        command.spawn().map(drop)
    }

    /// Watches the child `pid`, which must have come to be under a [`LaunchGuard`] that still exists.
    pub fn watch(&self, pid: i32) -> io::Result<Watched> {
        let (sender, exit) = oneshot::channel();
        let mut state = self.state.lock();
        if let Some(ended) = state.unclaimed.remove(&pid) {
            // The receiver is right here; it cannot have gone.
            let _ = sender.send(ended);
            return Ok(Watched { pidfd: None, exit });
        }
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        state.watched.insert(pid.as_raw_nonzero().get(), sender);
        Ok(Watched { pidfd: Some(pidfd), exit })
    }

    /// Reaps at each SIGCHLD, for ever.
    pub async fn run(self: Arc<Self>, mut child_signals: Signal) {
        loop {
            self.reap();
            if child_signals.recv().await.is_none() {
                return;
            }
        }
    }

    fn reap(&self) {
        let mut state = self.state.lock();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get();
            let exit = exit_of(status);
            if let Some(watcher) = state.watched.remove(&pid) {
                // Nobody is left who wants to know: the container was removed.
                let _ = watcher.send(exit);
            } else if state.launches > 0 {
                state.unclaimed.insert(pid, exit);
            }
        }
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    let (code, signal) = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => (code, 0),
        (None, Some(signal)) => (128 + signal, signal.unsigned_abs()),
        (None, None) => (255, 0),
    };
    Exit { code, signal, finished_at_nanos: realtime_nanos() }
}

/// CLOCK_REALTIME in nanoseconds since the epoch.
pub fn realtime_nanos() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}
