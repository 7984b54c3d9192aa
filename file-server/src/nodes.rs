//! The files that the guest knows, by the numbers it knows them by.
//!
//! A number is given with the answer to a lookup and stays valid until the guest has forgotten it as often as it was given.
//! It is never given to another file. Each known file is kept by an O_PATH descriptor, which pins its mount as well: the same
//! file in a writable and in a read-only share is two nodes.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::{Errno, Result};

use crate::fuse::{Attributes, ROOT};

/// Most files one guest may know at a time.
const MAX_NODES: usize = 1_000_000;

/// A file that the guest knows.
#[derive(Debug)]
pub struct Node {
    /// An O_PATH descriptor of it.
    pub fd: OwnedFd,
    /// What it is; that never changes.
    pub kind: FileType,
    /// The share it was found in; `None` for the root, which has the shares.
    pub share: Option<Arc<str>>,
}

impl Node {
    /// Refuses what would change the root: it belongs to the broker.
    pub fn changeable(&self) -> Result<&Self> {
        if self.share.is_some() { Ok(self) } else { Err(Errno::ROFS) }
    }

    /// What the host says about it.
    pub fn stat(&self) -> Result<Statx> {
        stat(self.fd.as_fd())
    }
}

/// What makes a file that file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    device: (u32, u32),
    inode: u64,
    share: Option<Arc<str>>,
}

#[derive(Debug)]
struct Entry {
    node: Arc<Node>,
    key: Key,
    lookups: u64,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    entries: HashMap<u64, Entry>,
    numbers: HashMap<Key, u64>,
    /// The host's file systems, by the order in which they were met.
    devices: HashMap<(u32, u32), u64>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Nodes {
    root: Arc<Node>,
    table: Mutex<Table>,
}

impl Nodes {
    /// Knows only the root directory: an O_PATH descriptor.
    pub fn new(root: OwnedFd) -> Self {
        let root = Arc::new(Node { fd: root, kind: FileType::Directory, share: None });
        Self { root, table: Mutex::new(Table { last: ROOT, ..Table::default() }) }
    }

    /// The file with this number.
    pub fn get(&self, number: u64) -> Result<Arc<Node>> {
        if number == ROOT {
            return Ok(Arc::clone(&self.root));
        }
        self.table.lock().entries.get(&number).map(|entry| Arc::clone(&entry.node)).ok_or(Errno::STALE)
    }

    /// Looks `name` up in `parent` and gives it a number, or its number once more.
    pub fn look_up(&self, parent: &Node, name: &CStr) -> Result<(u64, Arc<Node>, Attributes)> {
        let fd =
            rustix::fs::openat(&parent.fd, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let share = match &parent.share {
            Some(share) => Arc::clone(share),
            None => name.to_str().map_err(|_| Errno::NOENT)?.into(),
        };
        self.insert(fd, Some(share))
    }

    /// Gives the file behind `fd` (O_PATH) a number, or its number once more.
    fn insert(&self, fd: OwnedFd, share: Option<Arc<str>>) -> Result<(u64, Arc<Node>, Attributes)> {
        let stat = stat(fd.as_fd())?;
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let key = Key { mount: stat.stx_mnt_id, device, inode: stat.stx_ino, share: share.clone() };
        let mut table = self.table.lock();
        let attributes = Attributes { inode: table.inode(device, stat.stx_ino), stat };
        if let Some(number) = table.numbers.get(&key).copied()
            && let Some(entry) = table.entries.get_mut(&number)
        {
            entry.lookups = entry.lookups.saturating_add(1);
            return Ok((number, Arc::clone(&entry.node), attributes));
        }
        if table.entries.len() >= MAX_NODES {
            return Err(Errno::NFILE);
        }
        table.last += 1;
        let number = table.last;
        let node = Arc::new(Node { fd, kind: FileType::from_raw_mode(stat.stx_mode.into()), share });
        table.numbers.insert(key.clone(), number);
        table.entries.insert(number, Entry { node: Arc::clone(&node), key, lookups: 1 });
        Ok((number, node, attributes))
    }

    /// The attributes of `node`, from `fd` if the file is open.
    pub fn attributes(&self, node: &Node, fd: Option<BorrowedFd<'_>>) -> Result<Attributes> {
        let stat = stat(fd.unwrap_or(node.fd.as_fd()))?;
        let inode = self.table.lock().inode((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino);
        Ok(Attributes { inode, stat })
    }

    /// The number a file `inode` of the directory `node` has among those of all shares.
    pub fn inode_in(&self, node: &Node, inode: u64) -> Result<u64> {
        let stat = node.stat()?;
        Ok(self.table.lock().inode((stat.stx_dev_major, stat.stx_dev_minor), inode))
    }

    /// The guest has forgotten a number `count` times.
    pub fn forget(&self, number: u64, count: u64) {
        let mut table = self.table.lock();
        let Some(entry) = table.entries.get_mut(&number) else { return };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0
            && let Some(entry) = table.entries.remove(&number)
        {
            table.numbers.remove(&entry.key);
        }
    }

    /// Forgets every file of the shares that `gone` names.
    pub fn forget_shares(&self, gone: impl Fn(&str) -> bool) {
        let mut table = self.table.lock();
        let is_gone = |share: &Option<Arc<str>>| share.as_deref().is_some_and(&gone);
        table.entries.retain(|_, entry| !is_gone(&entry.key.share));
        table.numbers.retain(|key, _| !is_gone(&key.share));
    }
}

impl Table {
    /// A file's number that no file of another file system has: programs compare them to see whether two names are one file,
    /// and to the guest all shares are one file system.
    fn inode(&mut self, device: (u32, u32), inode: u64) -> u64 {
        let next = self.devices.len() as u64;
        let place = *self.devices.entry(device).or_insert(next);
        inode ^ (place << 48)
    }
}

fn stat(fd: BorrowedFd<'_>) -> Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted)
}
