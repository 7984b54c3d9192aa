//! The messages of FUSE (linux/fuse.h, version 7.41), as bytes: all integers are little endian, as on x86-64.

mod reply;
mod request;

pub use reply::{Attributes, Reply};
pub use request::{Body, Header, REQUEST_HEADER};

/// The version of the protocol.
pub const VERSION: (u32, u32) = (7, 41);
/// Number of the root directory.
pub const ROOT: u64 = 1;

/// enum fuse_opcode: what is served, or must be told from the rest.
pub mod opcode {
    #![allow(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
}

/// Flags of FUSE_INIT, of which the upper 32 travel as flags2.
pub mod init {
    /// Several reads of a file at once.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// Writes of more than a page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// Lookups and readdirs of a directory at once.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// max_pages counts.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// The server drops set-id bits where requests say so.
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    /// flags2 counts.
    pub const INIT_EXT: u64 = 1 << 30;
    /// MAP_SHARED of files that are read and written directly.
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    /// The mount may be id-mapped: owners of new files come mapped.
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// FOPEN_DIRECT_IO: reads and writes of the file do not go through the guest's page cache.
pub const OPEN_DIRECT_IO: u32 = 1;
/// FUSE_OPEN_KILL_SUIDGID, of FUSE_OPEN and FUSE_CREATE.
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// FUSE_WRITE_KILL_SUIDGID.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FUSE_GETATTR_FH: the handle is given.
pub const GETATTR_HANDLE: u32 = 1;
/// FUSE_FSYNC_FDATASYNC.
pub const FSYNC_DATA: u32 = 1;

/// Bits of fuse_setattr_in.valid.
pub mod setattr {
    #![allow(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}
