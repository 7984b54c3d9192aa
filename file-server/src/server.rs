//! What answers requests: the known files, the open ones, and the operations on them.

use std::os::fd::{AsRawFd, OwnedFd};

use isopod_proto::MAX_FUSE_DATA;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{Errno, Result};

use crate::fuse::{Body, Header, Reply, VERSION, init, opcode};
use crate::handles::Handles;
use crate::nodes::{Node, Nodes};

/// Requests of the guest's kernel itself, such as readahead, that it sends at once.
const MAX_BACKGROUND: u16 = 64;

/// A file system whose root has the shares. All threads of the session use the same one.
#[derive(Debug)]
pub struct Server {
    pub(crate) nodes: Nodes,
    pub(crate) handles: Handles,
    /// /proc/self/fd: the one way from an O_PATH descriptor to one that reads or writes.
    pub(crate) descriptors: OwnedFd,
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    pub header: Header,
    pub body: Body<'a>,
}

impl Server {
    /// Serves what is below `root` (O_PATH); `descriptors` is /proc/self/fd.
    pub fn new(root: OwnedFd, descriptors: OwnedFd) -> Self {
        Self { nodes: Nodes::new(root), handles: Handles::default(), descriptors }
    }

    /// Answers one request, `body` being what follows its header. `None`: there is no answer to it.
    pub fn answer<'r>(&self, header: Header, body: &[u8], reply: &'r mut Reply) -> Option<&'r [u8]> {
        let request = Request { header, body: Body(body) };
        reply.begin();
        let result = match header.opcode {
            opcode::FORGET => {
                self.forget(request);
                return None;
            }
            opcode::BATCH_FORGET => {
                self.batch_forget(request);
                return None;
            }
            _ => self.operate(request, reply),
        };
        Some(reply.finish(header.unique, result))
    }

    fn operate(&self, request: Request<'_>, reply: &mut Reply) -> Result<()> {
        match request.header.opcode {
            opcode::INIT => initialise(request.body, reply),
            opcode::DESTROY => {
                self.forget_shares(|_| true);
                Ok(())
            }
            opcode::LOOKUP => self.look_up(request, reply),
            opcode::GETATTR => self.get_attributes(request, reply),
            opcode::SETATTR => self.set_attributes(request, reply),
            opcode::READLINK => self.read_link(request, reply),
            opcode::SYMLINK => self.make_link(request, reply),
            opcode::MKNOD => self.make_node(request, reply),
            opcode::MKDIR => self.make_directory(request, reply),
            opcode::UNLINK => self.unlink(request, rustix::fs::AtFlags::empty()),
            opcode::RMDIR => self.unlink(request, rustix::fs::AtFlags::REMOVEDIR),
            opcode::RENAME => self.rename(request, false),
            opcode::RENAME2 => self.rename(request, true),
            opcode::LINK => self.hard_link(request, reply),
            opcode::OPEN => self.open(request, reply),
            opcode::CREATE => self.create(request, reply),
            opcode::READ => self.read(request, reply),
            opcode::WRITE => self.write(request, reply),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request),
            opcode::FSYNC | opcode::FSYNCDIR => self.sync(request),
            opcode::FALLOCATE => self.allocate(request),
            opcode::LSEEK => self.seek(request, reply),
            opcode::STATFS => self.stat_file_system(request, reply),
            opcode::OPENDIR => self.open_directory(request, reply),
            opcode::READDIR => self.read_directory(request, reply),
            opcode::SETXATTR => self.set_xattr(request),
            opcode::GETXATTR => self.get_xattr(request, reply),
            opcode::LISTXATTR => self.list_xattrs(request, reply),
            opcode::REMOVEXATTR => self.remove_xattr(request),
            // The guest's kernel then does without: locks and polls are its own, close has nothing to report as writes are not
            // kept back, and what it copies within the file system it reads and writes.
            _ => Err(Errno::NOSYS),
        }
    }

    /// Lets go of everything in the shares that `gone` names.
    pub fn forget_shares(&self, gone: impl Fn(&str) -> bool) {
        self.handles.close_shares(&gone);
        self.nodes.forget_shares(&gone);
    }

    /// Opens a file that is known. Only regular files and directories are: opening anything else may do anything.
    pub(crate) fn reopen(&self, node: &Node, flags: OFlags) -> Result<OwnedFd> {
        match node.kind {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let name = node.fd.as_raw_fd().to_string();
        rustix::fs::openat(&self.descriptors, name, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
    }
}

/// FUSE_INIT: agrees on what both sides can do.
fn initialise(mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
    let (major, _minor, readahead, flags) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
    if major != VERSION.0 {
        return Err(Errno::PROTO);
    }
    let flags = u64::from(flags);
    let offered = if flags & init::INIT_EXT != 0 { flags | u64::from(body.u32()?) << 32 } else { flags };
    let wanted = init::ASYNC_READ
        | init::BIG_WRITES
        | init::PARALLEL_DIROPS
        | init::MAX_PAGES
        | init::HANDLE_KILLPRIV_V2
        | init::INIT_EXT
        | init::DIRECT_IO_ALLOW_MMAP
        | init::ALLOW_IDMAP;
    let agreed = offered & wanted;
    reply.u32(VERSION.0);
    reply.u32(VERSION.1);
    reply.u32(readahead);
    reply.u32(agreed as u32);
    reply.bytes(&MAX_BACKGROUND.to_le_bytes());
    // congestion_threshold
    reply.bytes(&(MAX_BACKGROUND * 3 / 4).to_le_bytes());
    reply.u32(MAX_FUSE_DATA as u32);
    // time_gran: nanoseconds
    reply.u32(1);
    // max_pages, map_alignment
    reply.bytes(&((MAX_FUSE_DATA / 4096) as u16).to_le_bytes());
    reply.bytes(&[0; 2]);
    reply.u32((agreed >> 32) as u32);
    // max_stack_depth and what is not used
    reply.bytes(&[0; 28]);
    Ok(())
}

#[cfg(test)]
#[path = "tests/server.rs"]
mod tests;
