//! Contents of files.

use isopod_proto::MAX_FUSE_DATA;
use rustix::fs::{FallocateFlags, FileType, SeekFrom};
use rustix::io::{Errno, Result};

use super::names::open_flags;
use crate::fuse::{FSYNC_DATA, OPEN_DIRECT_IO, OPEN_KILL_SUIDGID, Reply, WRITE_KILL_SUIDGID};
use crate::server::{Request, Server};

impl Server {
    /// Opened for direct I/O, so that the guest's page cache keeps nothing: what the host or another pod writes is read the
    /// next moment. Files that are mapped are cached as long as they are.
    pub(crate) fn open(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let (flags, more) = (request.body.u32()?, request.body.u32()?);
        let node = self.nodes.get(request.header.node)?;
        if node.kind != FileType::RegularFile {
            return Err(Errno::NXIO);
        }
        let file = self.reopen(&node, open_flags(flags))?;
        if more & OPEN_KILL_SUIDGID != 0 && flags & libc::O_TRUNC as u32 != 0 {
            self.drop_set_id(&node)?;
        }
        let handle = self.handles.insert(file, node.share.clone())?;
        reply.open(handle, OPEN_DIRECT_IO);
        Ok(())
    }

    pub(crate) fn release(&self, mut request: Request<'_>) -> Result<()> {
        self.handles.remove(request.body.u64()?)
    }

    pub(crate) fn read(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let (handle, offset, size) = (request.body.u64()?, request.body.u64()?, request.body.u32()? as usize);
        if size > MAX_FUSE_DATA {
            return Err(Errno::INVAL);
        }
        let handle = self.handles.get(handle)?;
        reply.fill(size, |buffer| rustix::io::pread(&handle.fd, buffer, offset)).map(drop)
    }

    pub(crate) fn write(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let (handle, offset) = (request.body.u64()?, request.body.u64()?);
        let (size, flags) = (request.body.u32()? as usize, request.body.u32()?);
        request.body.skip(16)?;
        let data = request.body.0.get(..size).ok_or(Errno::INVAL)?;
        let handle = self.handles.get(handle)?;
        let written = rustix::io::pwrite(&handle.fd, data, offset)?;
        if flags & WRITE_KILL_SUIDGID != 0 {
            let node = self.nodes.get(request.header.node)?;
            self.drop_set_id(&node)?;
        }
        reply.u32(u32::try_from(written).map_err(|_| Errno::OVERFLOW)?);
        reply.u32(0);
        Ok(())
    }

    pub(crate) fn sync(&self, mut request: Request<'_>) -> Result<()> {
        let (handle, flags) = (request.body.u64()?, request.body.u32()?);
        let handle = self.handles.get(handle)?;
        if flags & FSYNC_DATA != 0 { rustix::fs::fdatasync(&handle.fd) } else { rustix::fs::fsync(&handle.fd) }
    }

    pub(crate) fn allocate(&self, mut request: Request<'_>) -> Result<()> {
        let (handle, offset) = (request.body.u64()?, request.body.u64()?);
        let (length, mode) = (request.body.u64()?, request.body.u32()?);
        let handle = self.handles.get(handle)?;
        rustix::fs::fallocate(&handle.fd, FallocateFlags::from_bits_retain(mode), offset, length)
    }

    pub(crate) fn seek(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let (handle, offset, whence) = (request.body.u64()?, request.body.u64()?, request.body.u32()?);
        let position = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        reply.u64(rustix::fs::seek(&self.handles.get(handle)?.fd, position)?);
        Ok(())
    }
}
