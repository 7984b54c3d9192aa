//! Extended attributes: those of users, and file capabilities. All others would be the host's: `trusted.` and `system.` mean
//! something to its kernel, and `security.` to its security modules.

use std::ffi::CStr;

use rustix::fs::{FileType, OFlags, XattrFlags};
use rustix::io::{Errno, Result};

use crate::fuse::Reply;
use crate::server::{Request, Server};

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of the kernel.
const MAX_SIZE: usize = 65536;
/// File capabilities.
const CAPABILITY: &[u8] = b"security.capability";

fn allowed(name: &CStr) -> bool {
    name.to_bytes().starts_with(b"user.") || name.to_bytes() == CAPABILITY
}

impl Server {
    /// The file, opened for reading, which is enough to change its attributes too.
    fn open_for_xattrs(&self, request: &Request<'_>) -> Result<std::os::fd::OwnedFd> {
        let node = self.nodes.get(request.header.node)?;
        match node.kind {
            FileType::RegularFile | FileType::Directory => self.reopen(&node, OFlags::RDONLY),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    pub(crate) fn set_xattr(&self, mut request: Request<'_>) -> Result<()> {
        let (size, flags) = (request.body.u32()? as usize, request.body.u32()?);
        let name = request.body.text()?;
        let value = request.body.0.get(..size).ok_or(Errno::INVAL)?;
        if !allowed(name) {
            return Err(Errno::OPNOTSUPP);
        }
        self.nodes.get(request.header.node)?.changeable()?;
        rustix::fs::fsetxattr(self.open_for_xattrs(&request)?, name, value, XattrFlags::from_bits_retain(flags))
    }

    pub(crate) fn get_xattr(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let size = request.body.u32()? as usize;
        request.body.skip(4)?;
        let name = request.body.text()?;
        if !allowed(name) {
            return Err(Errno::OPNOTSUPP);
        }
        let file = self.open_for_xattrs(&request)?;
        let mut value = vec![0; MAX_SIZE];
        let length = rustix::fs::fgetxattr(&file, name, &mut value)?;
        answer(reply, size, &value[..length])
    }

    pub(crate) fn list_xattrs(&self, mut request: Request<'_>, reply: &mut Reply) -> Result<()> {
        let size = request.body.u32()? as usize;
        let file = self.open_for_xattrs(&request)?;
        let mut names = vec![0; MAX_SIZE];
        let length = rustix::fs::flistxattr(&file, &mut names)?;
        let shown: Vec<u8> = names[..length]
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| CStr::from_bytes_with_nul(name).is_ok_and(allowed))
            .flatten()
            .copied()
            .collect();
        answer(reply, size, &shown)
    }

    pub(crate) fn remove_xattr(&self, mut request: Request<'_>) -> Result<()> {
        let name = request.body.text()?;
        if !allowed(name) {
            return Err(Errno::OPNOTSUPP);
        }
        self.nodes.get(request.header.node)?.changeable()?;
        rustix::fs::fremovexattr(self.open_for_xattrs(&request)?, name)
    }
}

/// The value, or, to a question with size 0, its length (struct fuse_getxattr_out).
fn answer(reply: &mut Reply, size: usize, value: &[u8]) -> Result<()> {
    if size == 0 {
        reply.u32(value.len() as u32);
        reply.u32(0);
        return Ok(());
    }
    if value.len() > size {
        return Err(Errno::RANGE);
    }
    reply.bytes(value);
    Ok(())
}
