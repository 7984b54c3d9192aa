//! Writing EROFS file systems, in one pass: file data first, as they come, then metadata, the superblock last.
//!
//! The format is the kernel's (Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h), of which this uses: blocks of
//! 4 KiB, extended inodes (64 bytes, with their own times), plain layout for files (so that data are block aligned and can be
//! mapped, or referred to by chunk), inline layout for what is small in directories and symbolic links, inline extended
//! attributes, and the superblock's checksum. The same tree in the same order gives the same bytes.
//!
//! What was written is read back as a tree (`reader.rs`), trees of layers are merged (`merge.rs`), and a merged tree is written as
//! a file system whose files' data are in the layers' files, which follow it on one disk.

mod early_sync;
mod format;
mod merge;
mod output;
mod reader;
mod tree;
mod writer;

pub(crate) use format::{ALIGNMENT, BLOCK_SIZE, Xattr, xattr_prefix};
pub(crate) use merge::{MergeLimits, TooMuch};
pub(crate) use output::Written;
pub(crate) use reader::{ReadError, data_bytes, read_tree};
pub(crate) use tree::{Attributes, FileType, PathError, Tree};
pub(crate) use writer::{Data, ErofsWriter};
