//! Streams of bytes of a process: what is kept of its output, and its input. See stream.proto for the protocol.

mod connection;
mod forward;
mod window;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::termios::{LocalModes, SpecialCodeIndex};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::Instant;

pub use self::connection::serve;
pub use self::window::{OutOfWindow, Window};
use crate::error::{Context as _, Result};
use crate::reaper::Exit;
use crate::sys;

/// How long output may stay silent after the process has ended while somebody still holds the other end of the pipe.
const QUIET_AFTER_EXIT: Duration = Duration::from_secs(2);
/// How long somebody else may go on writing after the process has ended.
const LONGEST_AFTER_EXIT: Duration = Duration::from_secs(10);

/// A pipe end or terminal in non-blocking mode, registered with the runtime.
pub type AsyncFile = AsyncFd<OwnedFd>;

/// Makes `descriptor` non-blocking and registers it.
pub fn register(descriptor: OwnedFd) -> Result<AsyncFile> {
    rustix::io::ioctl_fionbio(&descriptor, true).context(|| "make a pipe non-blocking")?;
    sys::register(descriptor).context(|| "watch a pipe")
}

/// An output stream of a process.
pub struct Output {
    window: Mutex<Window>,
    changed: watch::Sender<()>,
    /// Number of the connection that may use the stream; a newer one takes it over.
    connection: watch::Sender<u64>,
}

impl Default for Output {
    fn default() -> Self {
        Self { window: Mutex::default(), changed: watch::channel(()).0, connection: watch::channel(0).0 }
    }
}

impl Output {
    /// Waits until the stream has ended and every byte is acknowledged.
    pub async fn drained(&self) {
        self.wait_until(|window| window.is_drained().then_some(())).await;
    }

    /// Drops what is kept and ends the stream: nobody will take it any more.
    pub fn abandon(&self) {
        self.change(Window::abandon);
    }

    async fn wait_until<T>(&self, condition: impl Fn(&Window) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            if let Some(value) = condition(&self.window.lock()) {
                return value;
            }
            changed.changed().await.expect("the sender is a field of self");
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Window) -> T) -> T {
        let result = change(&mut self.window.lock());
        self.changed.send_replace(());
        result
    }

    /// Reads `source` into the window until its end, or until it can be given up after the process's exit.
    pub async fn pump(self: Arc<Self>, source: Arc<AsyncFile>, exit: watch::Receiver<Option<Exit>>) {
        let mut patience = Patience { exit, since: None, left_over: 0 };
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let room = self.wait_until(|window| (window.room() > 0).then_some(window.room())).await;
            let limit = room.min(buffer.len());
            let count = tokio::select! {
                biased;
                count = read(&source, &mut buffer[..limit]) => count,
                () = patience.lost(&source) => 0,
            };
            if count == 0 {
                break;
            }
            patience.left_over = patience.left_over.saturating_sub(count as u64);
            let abandoned = self.change(|window| {
                if !window.is_finished() {
                    window.push(&buffer[..count]);
                }
                window.is_finished()
            });
            if abandoned {
                return;
            }
        }
        self.change(Window::finish);
    }
}

/// When a pump gives up on a pipe that others than its process hold open.
struct Patience {
    exit: watch::Receiver<Option<Exit>>,
    since: Option<Instant>,
    /// Bytes that were in the pipe when the process had ended: they are its own, and are read however long it takes.
    left_over: u64,
}

impl Patience {
    async fn lost(&mut self, source: &AsyncFile) {
        // An error means that the sender, the process's own task, is gone: then so is the process.
        let _ = self.exit.wait_for(Option::is_some).await;
        let since = *self.since.get_or_insert_with(|| {
            self.left_over = rustix::io::ioctl_fionread(source.get_ref()).unwrap_or(0);
            Instant::now()
        });
        let quiet = Instant::now() + QUIET_AFTER_EXIT;
        let longest = if self.left_over > 0 { quiet } else { since + LONGEST_AFTER_EXIT };
        tokio::time::sleep_until(quiet.min(longest)).await;
    }
}

/// Reads some bytes; 0 at the end, which for a terminal is EIO: nobody has it open any more.
async fn read(source: &AsyncFile, buffer: &mut [u8]) -> usize {
    loop {
        let Ok(mut ready) = source.readable().await else { return 0 };
        match rustix::io::read(source.get_ref(), &mut *buffer) {
            Ok(count) => return count,
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(_) => return 0,
        }
    }
}

/// The input of a process.
pub struct Input {
    target: watch::Sender<Target>,
    connection: watch::Sender<u64>,
}

/// Where input goes.
#[derive(Clone)]
pub enum Target {
    /// The end of the input was given, or the process has ended.
    Closed,
    /// The writing end of its standard input.
    Pipe(Arc<AsyncFile>),
    /// The master of its terminal.
    Terminal(Arc<AsyncFile>),
}

impl Input {
    /// Input to `target`.
    pub fn new(target: Target) -> Self {
        Self { target: watch::channel(target).0, connection: watch::channel(0).0 }
    }

    /// Lets the process see the end of its input. On a terminal that reads lines it is the end-of-file character.
    async fn finish(&self) {
        let target = self.target.borrow().clone();
        match target {
            Target::Closed => {}
            Target::Pipe(_) => self.close(),
            Target::Terminal(terminal) => {
                if let Ok(modes) = rustix::termios::tcgetattr(terminal.get_ref())
                    && modes.local_modes.contains(LocalModes::ICANON)
                {
                    // A terminal that nobody has open any more needs no end.
                    let _ = write_all(&terminal, &[modes.special_codes[SpecialCodeIndex::VEOF]]).await;
                }
            }
        }
    }

    /// Lets go of the pipe or terminal.
    pub fn close(&self) {
        self.target.send_replace(Target::Closed);
    }

    /// Writes all of `bytes`. False: the process does not read any more.
    async fn write(&self, bytes: &[u8]) -> bool {
        let target = self.target.borrow().clone();
        match target {
            Target::Closed => false,
            Target::Pipe(file) | Target::Terminal(file) => tokio::select! {
                result = write_all(&file, bytes) => result.is_ok(),
                () = self.closed() => false,
            },
        }
    }

    /// Waits until there is nothing to write to any more.
    async fn closed(&self) {
        let mut target = self.target.subscribe();
        // The sender is a field of self, so this ends only when the condition holds.
        let _ = target.wait_for(|target| matches!(target, Target::Closed)).await;
    }
}

async fn write_all(target: &AsyncFile, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = target.writable().await.map_err(|_| Errno::IO)?;
        match rustix::io::write(target.get_ref(), bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
