//! Looking up, making and removing names.

use std::ffi::CStr;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::{Errno, Result};

use super::attributes::change_owner;
use crate::fuse::{OPEN_DIRECT_IO, Reply};
use crate::nodes::Node;
use crate::server::{Request, Server};

/// Permission bits, with set-id and sticky.
const PERMISSIONS: u32 = 0o7777;
/// What a guest may say about how a file is opened; everything else is the guest's kernel's concern.
const OPEN_FLAGS: OFlags = OFlags::ACCMODE.union(OFlags::APPEND).union(OFlags::DSYNC).union(OFlags::SYNC);

/// The flags of a FUSE_OPEN or FUSE_CREATE that count.
pub(super) fn open_flags(raw: u32) -> OFlags {
    OFlags::from_bits_retain(raw) & OPEN_FLAGS
}

impl Server {
    pub(crate) fn look_up(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let name = request.body.name()?;
        let parent = self.nodes.get(request.header.node)?;
        self.enter(&parent, name, reply).map(drop)
    }

    /// Answers with the entry `name` of `parent`, and returns it.
    fn enter(&self, parent: &Node, name: &CStr, reply: &mut Reply) -> Result<Arc<Node>> {
        let (number, node, attributes) = self.nodes.look_up(parent, name)?;
        reply.entry(number, &attributes);
        Ok(node)
    }

    pub(crate) fn forget(&self, mut request: Request<'_>) {
        if let Ok(count) = request.body.u64() {
            self.nodes.forget(request.header.node, count);
        }
    }

    pub(crate) fn batch_forget(&self, mut request: Request<'_>) {
        let body = &mut request.body;
        let Ok(count) = body.u32() else { return };
        if body.skip(4).is_err() {
            return;
        }
        for _ in 0..count {
            let (Ok(node), Ok(lookups)) = (body.u64(), body.u64()) else { return };
            self.nodes.forget(node, lookups);
        }
    }

    /// Gives what was just made as `name` to whom the request is from, and answers with its entry. Taken away again if that
    /// fails.
    fn adopt(&self, parent: &Node, name: &CStr, request: &Request<'_>, mode: u32, reply: &mut Reply) -> Result<()> {
        let adopted = self.nodes.look_up(parent, name).and_then(|(number, node, _)| {
            let given = self.give(parent, &node, request, mode).and_then(|()| self.nodes.attributes(&node, None));
            // A number that the guest is not told of is never forgotten by it.
            given.inspect_err(|_| self.nodes.forget(number, 1)).map(|attributes| reply.entry(number, &attributes))
        });
        adopted.inspect_err(|_| {
            let flag = if mode & libc::S_IFMT == libc::S_IFDIR { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            // What cannot be removed now was made by the guest and stays, with root as its owner.
            let _ = rustix::fs::unlinkat(&parent.fd, name, flag);
        })
    }

    /// Sets owner and, as changing owners clears them, set-id bits. The group is the parent's where that has set-group-id.
    fn give(&self, parent: &Node, node: &Node, request: &Request<'_>, mode: u32) -> Result<()> {
        let inherits = u32::from(parent.stat()?.stx_mode) & libc::S_ISGID != 0;
        let (uid, gid) = (request.header.uid, request.header.gid);
        let group = (!inherits && gid != 0).then_some(gid);
        let owner = (uid != 0).then_some(uid);
        if owner.is_some() || group.is_some() {
            change_owner(node, owner, group)?;
        }
        if mode & (libc::S_ISUID | libc::S_ISGID) != 0 && node.kind != FileType::Symlink {
            self.change_mode(node, mode)?;
        }
        Ok(())
    }

    pub(super) fn change_mode(&self, node: &Node, mode: u32) -> Result<()> {
        if node.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let name = node.fd.as_raw_fd().to_string();
        rustix::fs::chmodat(&self.descriptors, name, Mode::from_raw_mode(mode & PERMISSIONS), AtFlags::empty())
    }

    pub(crate) fn make_node(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let (mode, _rdev) = (request.body.u32()?, request.body.u32()?);
        request.body.skip(8)?;
        let name = request.body.name()?;
        let kind = FileType::from_raw_mode(mode);
        // A device node would be one of the host's devices to whoever opens it there.
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        let parent = self.nodes.get(request.header.node)?;
        let permissions = Mode::from_raw_mode(mode & PERMISSIONS);
        rustix::fs::mknodat(&parent.changeable()?.fd, name, kind, permissions, 0)?;
        self.adopt(&parent, name, &request, mode, reply)
    }

    pub(crate) fn make_directory(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let (mode, _umask) = (request.body.u32()?, request.body.u32()?);
        let name = request.body.name()?;
        let parent = self.nodes.get(request.header.node)?;
        rustix::fs::mkdirat(&parent.changeable()?.fd, name, Mode::from_raw_mode(mode & PERMISSIONS))?;
        // mkdir leaves set-group-id to the parent, which gives it without being asked.
        self.adopt(&parent, name, &request, libc::S_IFDIR | (mode & 0o1777), reply)
    }

    pub(crate) fn make_link(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let name = request.body.name()?;
        let target = request.body.text()?;
        let parent = self.nodes.get(request.header.node)?;
        rustix::fs::symlinkat(target, &parent.changeable()?.fd, name)?;
        self.adopt(&parent, name, &request, libc::S_IFLNK, reply)
    }

    pub(crate) fn read_link(&self, request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let node = self.nodes.get(request.header.node)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&node.fd, c"", Vec::new())?;
        reply.bytes(target.as_bytes());
        Ok(())
    }

    pub(crate) fn unlink(&self, mut request: Request<'_>, flags: AtFlags) -> Result<()> {
        let name = request.body.name()?;
        rustix::fs::unlinkat(&self.nodes.get(request.header.node)?.changeable()?.fd, name, flags)
    }

    pub(crate) fn rename(&self, mut request: Request<'_>, with_flags: bool) -> Result<()> {
        let target = request.body.u64()?;
        let mut flags = RenameFlags::empty();
        if with_flags {
            flags = RenameFlags::from_bits_retain(request.body.u32()?);
            request.body.skip(4)?;
        }
        // A whiteout is a device node.
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (request.body.name()?, request.body.name()?);
        let (from, to) = (self.nodes.get(request.header.node)?, self.nodes.get(target)?);
        rustix::fs::renameat_with(&from.changeable()?.fd, old, &to.changeable()?.fd, new, flags)
    }

    pub(crate) fn hard_link(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let existing = self.nodes.get(request.body.u64()?)?;
        let name = request.body.name()?;
        let parent = self.nodes.get(request.header.node)?;
        existing.changeable()?;
        // Linking a descriptor itself needs CAP_DAC_READ_SEARCH.
        let source = existing.fd.as_raw_fd().to_string();
        let flags = AtFlags::SYMLINK_FOLLOW;
        rustix::fs::linkat(&self.descriptors, source, &parent.changeable()?.fd, name, flags)?;
        self.enter(&parent, name, reply).map(drop)
    }

    pub(crate) fn create(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let (raw, mode) = (request.body.u32()?, request.body.u32()?);
        request.body.skip(8)?;
        let name = request.body.name()?;
        let parent = self.nodes.get(request.header.node)?;
        let flags = open_flags(raw);
        let new = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let permissions = Mode::from_raw_mode(mode & PERMISSIONS);
        match rustix::fs::openat(&parent.changeable()?.fd, name, new, permissions) {
            Ok(file) => {
                self.adopt(&parent, name, &request, libc::S_IFREG | (mode & PERMISSIONS), reply)?;
                let handle = self.handles.insert(file, parent.share.clone())?;
                reply.open(handle, OPEN_DIRECT_IO);
                Ok(())
            }
            // The host has made one since the guest looked; it keeps its owner.
            Err(Errno::EXIST) if raw & libc::O_EXCL as u32 == 0 => {
                let node = self.enter(&parent, name, reply)?;
                if node.kind != FileType::RegularFile {
                    return Err(Errno::EXIST);
                }
                let file = self.reopen(&node, flags)?;
                let handle = self.handles.insert(file, node.share.clone())?;
                reply.open(handle, OPEN_DIRECT_IO);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}
