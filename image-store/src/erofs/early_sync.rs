//! Writing a file to the disk while more of it is written, so that the sync at its end has little left to wait for.

use std::fs::File;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

/// Bytes from one sync to the next. Files that are shorter have none.
const STEP: u64 = 32 << 20;

/// Syncs a file that grows. Its thread, which only long files have, ends with it.
pub(super) struct EarlySync {
    next: u64,
    thread: Option<Syncing>,
}

struct Syncing {
    due: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl EarlySync {
    pub(super) fn new() -> Self {
        Self { next: STEP, thread: None }
    }

    /// So many bytes of `file` are written. Waits while the disk is more than two steps behind: what is cut waits no longer for it,
    /// and the host's memory is not full of what is not written.
    pub(super) fn written(&mut self, file: &File, bytes: u64) -> io::Result<()> {
        if bytes < self.next {
            return Ok(());
        }
        self.next = bytes + STEP;
        let syncing = match self.thread.take() {
            Some(syncing) => syncing,
            None => start(file.try_clone()?)?,
        };
        match syncing.due.send(()) {
            Ok(()) => self.thread = Some(syncing),
            // It has ended, which it does early for an error alone.
            Err(_) => end(syncing)?,
        }
        Ok(())
    }

    /// Waits for what was begun. The error of a sync is told once: here, and not by a later sync of the same file.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.thread.take().map_or(Ok(()), end)
    }
}

impl Drop for EarlySync {
    fn drop(&mut self) {
        // Whoever drops it unfinished has an error of its own.
        let _ = self.finish();
    }
}

fn start(file: File) -> io::Result<Syncing> {
    let (due, steps) = sync_channel(1);
    let body = move || steps.into_iter().try_for_each(|()| file.sync_data());
    let thread = thread::Builder::new().name("layer-sync".into()).spawn(body)?;
    Ok(Syncing { due, thread })
}

fn end(Syncing { due, thread }: Syncing) -> io::Result<()> {
    drop(due);
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs died")))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_long_file_is_synced_and_a_sync_that_fails_is_told() {
        let mut file = tempfile::tempfile().expect("a file");
        let mut sync = EarlySync::new();
        for step in 0..5 {
            file.write_all(&[1; 4096]).expect("there is room");
            sync.written(&file, step * STEP).expect("it can be synced");
            assert_eq!(sync.thread.is_some(), step > 0);
        }
        sync.finish().expect("it can be synced");
        // A pipe cannot be synced.
        let (_reader, writer) = io::pipe().expect("a pipe");
        let pipe = File::from(std::os::fd::OwnedFd::from(writer));
        let mut sync = EarlySync::new();
        let error = (1..100).find_map(|step| sync.written(&pipe, step * STEP).err()).or_else(|| sync.finish().err());
        assert_eq!(error.expect("told").kind(), io::ErrorKind::InvalidInput);
    }
}
