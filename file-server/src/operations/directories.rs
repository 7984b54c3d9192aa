//! Reading directories.

use std::mem::MaybeUninit;

use isopod_proto::MAX_FUSE_DATA;
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::{Errno, Result};

use crate::fuse::Reply;
use crate::server::{Request, Server};

/// Bytes of entries taken from the host's kernel at once.
const BATCH: usize = 16 * 1024;

impl Server {
    pub(crate) fn open_directory(&self, request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let node = self.nodes.get(request.header.node)?;
        if node.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let directory = self.reopen(&node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        reply.open(self.handles.insert(directory, node.share.clone())?, 0);
        Ok(())
    }

    /// From where the guest says; that is what an earlier entry had as its `next`, or any number, which the host's kernel
    /// makes the best of.
    pub(crate) fn read_directory(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let (handle, offset, size) = (request.body.u64()?, request.body.u64()?, request.body.u32()? as usize);
        let limit = size.min(MAX_FUSE_DATA);
        let node = self.nodes.get(request.header.node)?;
        let handle = self.handles.get(handle)?;
        let salt = self.nodes.inode_in(&node, 0)?;
        let _reading = handle.reading.lock();
        rustix::fs::seek(&handle.fd, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); BATCH];
        let mut entries = RawDir::new(&handle.fd, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let (next, name) = (entry.next_entry_cookie(), entry.file_name().to_bytes());
            let kind = match entry.file_type() {
                FileType::Unknown => 0,
                kind => kind.as_raw_mode() >> 12,
            };
            if !reply.directory_entry(limit, entry.ino() ^ salt, next, kind, name) {
                break;
            }
        }
        Ok(())
    }
}
