//! The files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::{Errno, Result};

/// Most of them at a time.
const MAX_HANDLES: usize = 100_000;

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    /// The descriptor.
    pub fd: OwnedFd,
    /// The share it is in.
    pub share: Option<Arc<str>>,
    /// Held while a directory is read, since reading moves the descriptor's position.
    pub reading: Mutex<()>,
}

/// All of them, by the numbers the guest was given.
#[derive(Debug, Default)]
pub struct Handles(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    last: u64,
    open: HashMap<u64, Arc<Handle>>,
}

impl Handles {
    /// Keeps `fd` and returns its number.
    pub fn insert(&self, fd: OwnedFd, share: Option<Arc<str>>) -> Result<u64> {
        let mut table = self.0.lock();
        if table.open.len() >= MAX_HANDLES {
            return Err(Errno::MFILE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(Handle { fd, share, reading: Mutex::new(()) }));
        Ok(number)
    }

    /// What was opened under this number.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>> {
        self.0.lock().open.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// Closes it.
    pub fn remove(&self, number: u64) -> Result<()> {
        let removed = self.0.lock().open.remove(&number);
        // Closed outside of the lock: that may have to wait for the file system.
        removed.map(drop).ok_or(Errno::BADF)
    }

    /// Closes everything that is in the shares that `gone` names.
    pub fn close_shares(&self, gone: impl Fn(&str) -> bool) {
        self.0.lock().open.retain(|_, handle| !handle.share.as_deref().is_some_and(&gone));
    }
}
