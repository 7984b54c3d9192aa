//! Attributes of files and of the file system.

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, Gid, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};
use rustix::io::{Errno, Result};

use crate::fuse::{GETATTR_HANDLE, Reply, setattr};
use crate::nodes::Node;
use crate::server::{Request, Server};

/// fuse_setattr_in.
struct Wanted {
    valid: u32,
    handle: u64,
    size: u64,
    times: Timestamps,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Wanted {
    fn parse(request: &mut Request<'_>) -> Result<Self> {
        let body = &mut request.body;
        let valid = body.u32()?;
        body.skip(4)?;
        let (handle, size) = (body.u64()?, body.u64()?);
        body.skip(8)?;
        let (atime, mtime, _ctime) = (body.u64()?, body.u64()?, body.u64()?);
        let (atime_nanos, mtime_nanos, _ctime_nanos) = (body.u32()?, body.u32()?, body.u32()?);
        let mode = body.u32()?;
        body.skip(4)?;
        let (uid, gid) = (body.u32()?, body.u32()?);
        let time = |set: u32, now: u32, seconds: u64, nanos: u32| {
            let tv_nsec = match () {
                () if valid & now != 0 => UTIME_NOW,
                () if valid & set != 0 && nanos < 1_000_000_000 => i64::from(nanos),
                () => UTIME_OMIT,
            };
            Timespec { tv_sec: seconds.cast_signed(), tv_nsec }
        };
        let times = Timestamps {
            last_access: time(setattr::ATIME, setattr::ATIME_NOW, atime, atime_nanos),
            last_modification: time(setattr::MTIME, setattr::MTIME_NOW, mtime, mtime_nanos),
        };
        Ok(Self { valid, handle, size, times, mode, uid, gid })
    }

    fn has(&self, bits: u32) -> bool {
        self.valid & bits != 0
    }
}

/// Changes owner and group where they are given.
pub(super) fn change_owner(node: &Node, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    // The number that stands for none.
    if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
        return Err(Errno::INVAL);
    }
    rustix::fs::chownat(&node.fd, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)
}

impl Server {
    pub(crate) fn get_attributes(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let flags = request.body.u32()?;
        request.body.skip(4)?;
        let handle = request.body.u64()?;
        let node = self.nodes.get(request.header.node)?;
        let open = if flags & GETATTR_HANDLE != 0 { Some(self.handles.get(handle)?) } else { None };
        let attributes = self.nodes.attributes(&node, open.as_ref().map(|open| open.fd.as_fd()))?;
        reply.attr_out(&attributes);
        Ok(())
    }

    pub(crate) fn set_attributes(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let wanted = Wanted::parse(&mut request)?;
        let node = self.nodes.get(request.header.node)?;
        node.changeable()?;
        if wanted.has(setattr::MODE) {
            self.change_mode(&node, wanted.mode)?;
        }
        if wanted.has(setattr::UID | setattr::GID) {
            let owner = wanted.has(setattr::UID).then_some(wanted.uid);
            let group = wanted.has(setattr::GID).then_some(wanted.gid);
            change_owner(&node, owner, group)?;
        }
        if wanted.has(setattr::SIZE) {
            self.change_size(&node, &wanted)?;
        }
        if wanted.has(setattr::ATIME | setattr::MTIME | setattr::ATIME_NOW | setattr::MTIME_NOW) {
            rustix::fs::utimensat(&node.fd, c"", &wanted.times, AtFlags::EMPTY_PATH)?;
        }
        let attributes = self.nodes.attributes(&node, None)?;
        reply.attr_out(&attributes);
        Ok(())
    }

    fn change_size(&self, node: &Node, wanted: &Wanted) -> Result<()> {
        if wanted.has(setattr::HANDLE) {
            rustix::fs::ftruncate(&self.handles.get(wanted.handle)?.fd, wanted.size)?;
        } else {
            rustix::fs::ftruncate(self.reopen(node, OFlags::WRONLY)?, wanted.size)?;
        }
        if wanted.has(setattr::KILL_SUIDGID) { self.drop_set_id(node) } else { Ok(()) }
    }

    /// What writing by somebody without CAP_FSETID does to set-id bits (file_remove_privs of the kernel): this process has that
    /// capability, so that the host's kernel leaves them.
    pub(super) fn drop_set_id(&self, node: &Node) -> Result<()> {
        let mode = u32::from(node.stat()?.stx_mode);
        let mut kept = mode & !libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 {
            kept &= !libc::S_ISGID;
        }
        if kept == mode { Ok(()) } else { self.change_mode(node, kept) }
    }

    pub(crate) fn stat_file_system(&self, request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let node = self.nodes.get(request.header.node)?;
        let stat = rustix::fs::fstatvfs(&node.fd)?;
        for value in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            reply.u64(value);
        }
        let short = |value: u64| u32::try_from(value).map_err(|_| Errno::OVERFLOW);
        reply.u32(short(stat.f_bsize)?);
        reply.u32(short(stat.f_namemax)?);
        reply.u32(short(stat.f_frsize)?);
        // padding, spare
        reply.bytes(&[0; 28]);
        Ok(())
    }
}
