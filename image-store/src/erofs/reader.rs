//! Reading back what the writer has written, as a tree. Total and bounded; what was read is held against its hashes, so that a
//! file that was damaged since is an error.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::format::{
    ALIGNMENT, BLOCK_SIZE, FLAT_INLINE, INODE_SIZE, InodeFields, SLOT, Superblock, Xattr, decode_dirents,
    decode_xattrs, xattr_prefix,
};
use super::tree::{Attributes, Content, Entries, FileType, IMPLIED, Inode, InodeId, OPAQUE, ROOT, Tree};
use crate::verity;

/// What is read at once. The writer's order makes all reading sequential.
const WINDOW: usize = 256 << 10;
/// Most bytes of a symbolic link's target.
const TARGET_MAX: u64 = 4095;

/// Why a file system cannot be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    Io(io::Error),
    /// It is not what the writer writes.
    Malformed(&'static str),
    /// It has more names than allowed.
    TooMany,
}

/// Bytes of the file system in `file`, up to the next multiple of [`ALIGNMENT`].
pub(crate) fn data_bytes(file: &File) -> Result<u64, ReadError> {
    Ok((u64::from(superblock(file)?.blocks) * BLOCK_SIZE as u64).next_multiple_of(ALIGNMENT))
}

fn superblock(file: &File) -> Result<Superblock, ReadError> {
    let mut block = [0; BLOCK_SIZE];
    file.read_exact_at(&mut block, 0).map_err(ReadError::Io)?;
    let superblock = Superblock::decode(&block).filter(|superblock| superblock.blocks > 0);
    superblock.ok_or(ReadError::Malformed("its superblock is not intact"))
}

/// The tree of the file system in `file`, which has at most `max_names` names. Its hashes follow it.
pub(crate) fn read_tree(file: &File, max_names: u64) -> Result<Tree, ReadError> {
    let superblock = superblock(file)?;
    let end = u64::from(superblock.blocks) * BLOCK_SIZE as u64;
    let window = || Window { file, start: 0, bytes: Vec::new(), end };
    let mut reader = Reader {
        metadata: u64::from(superblock.meta_block) * BLOCK_SIZE as u64,
        blocks: superblock.blocks,
        parents: window(),
        children: window(),
        contents: window(),
        tree: Tree { inodes: Vec::new() },
        linked: HashMap::new(),
        directories: HashSet::new(),
        queue: VecDeque::new(),
        names_left: max_names,
    };
    let root = reader.add(u64::from(superblock.root_nid))?;
    if !matches!(reader.tree.inodes[root.0].content, Content::Directory { .. }) {
        return Err(ReadError::Malformed("its root is no directory"));
    }
    debug_assert_eq!(root, ROOT);
    while let Some((nid, id)) = reader.queue.pop_front() {
        reader.fill(nid, id)?;
    }
    Ok(reader.tree)
}

/// A part of a file in memory.
struct Window<'a> {
    file: &'a File,
    start: u64,
    bytes: Vec<u8>,
    /// Where the file system ends.
    end: u64,
}

impl Window<'_> {
    /// `length` bytes from `position` on. At most what a 16-bit count of attributes can say, see [`InodeFields`].
    fn get(&mut self, position: u64, length: usize) -> Result<&[u8], ReadError> {
        let end = position.checked_add(length as u64).filter(|end| *end <= self.end);
        let end = end.ok_or(ReadError::Malformed("something in it is beyond its end"))?;
        if position < self.start || end > self.start + self.bytes.len() as u64 {
            self.start = position - position % BLOCK_SIZE as u64;
            let wanted =
                (self.end - self.start).min((BLOCK_SIZE + length).next_multiple_of(BLOCK_SIZE).max(WINDOW) as u64);
            // Bounded just above; whole blocks, as the end is one's.
            self.bytes.resize(wanted as usize, 0);
            self.file.read_exact_at(&mut self.bytes, self.start).map_err(ReadError::Io)?;
            match verity::matches(self.file, self.end.next_multiple_of(ALIGNMENT), self.start, &self.bytes) {
                Ok(true) => {}
                Ok(false) => return Err(ReadError::Malformed("its metadata do not match their hashes")),
                Err(error) => return Err(ReadError::Io(error)),
            }
        }
        let offset = (position - self.start) as usize;
        Ok(&self.bytes[offset..offset + length])
    }
}

struct Reader<'a> {
    /// Where inode 0 would be.
    metadata: u64,
    blocks: u32,
    /// Inodes of directories whose names are being read, of what these names stand for, and blocks that follow the inodes.
    parents: Window<'a>,
    children: Window<'a>,
    contents: Window<'a>,
    tree: Tree,
    /// Files with more than one name.
    linked: HashMap<u64, InodeId>,
    directories: HashSet<u64>,
    /// Directories whose names are still to be read, breadth first as they were written.
    queue: VecDeque<(u64, InodeId)>,
    names_left: u64,
}

impl Reader<'_> {
    /// The inode `nid`, which is read unless it is a further name of a file.
    fn add(&mut self, nid: u64) -> Result<InodeId, ReadError> {
        if let Some(id) = self.linked.get(&nid) {
            return Ok(*id);
        }
        let position = self.position(nid)?;
        let fields = inode(&mut self.children, position)?;
        let xattrs = self.children.get(position + INODE_SIZE as u64, fields.xattr_bytes)?;
        let mut xattrs = decode_xattrs(xattrs).ok_or(ReadError::Malformed("it has malformed attributes"))?;
        let content = match fields.mode & 0o170_000 {
            0o040_000 => {
                if !self.directories.insert(nid) {
                    return Err(ReadError::Malformed("a directory in it has two names"));
                }
                let (opaque, implied) = (take_mark(&mut xattrs, OPAQUE), take_mark(&mut xattrs, IMPLIED));
                Content::Directory { entries: Entries::new(), opaque, implied }
            }
            0o100_000 => {
                let end = fields.size.div_ceil(BLOCK_SIZE as u64).checked_add(u64::from(fields.union));
                if fields.format == FLAT_INLINE || end.is_none_or(|end| end > u64::from(self.blocks)) {
                    return Err(ReadError::Malformed("a file in it has data elsewhere"));
                }
                Content::File(FileType::Regular { first_block: fields.union, size: fields.size })
            }
            0o120_000 => Content::File(FileType::Symlink(self.target(position, &fields)?)),
            0o020_000 => Content::File(device(fields.union, FileType::CharDevice)),
            0o060_000 => Content::File(device(fields.union, FileType::BlockDevice)),
            0o010_000 => Content::File(FileType::Fifo),
            _ => return Err(ReadError::Malformed("something in it is of an unknown type")),
        };
        let InodeFields { mode, uid, gid, mtime, mtime_nanos, nlink, .. } = fields;
        let attributes = Attributes { mode: mode & 0o7777, uid, gid, mtime, mtime_nanos, xattrs };
        let directory = matches!(content, Content::Directory { .. });
        let id = self.tree.push(Inode { attributes, content });
        if directory {
            self.queue.push_back((nid, id));
        } else if nlink > 1 {
            self.linked.insert(nid, id);
        }
        Ok(id)
    }

    fn target(&mut self, position: u64, fields: &InodeFields) -> Result<Box<[u8]>, ReadError> {
        if !(1..=TARGET_MAX).contains(&fields.size) {
            return Err(ReadError::Malformed("a symbolic link in it has no possible target"));
        }
        // Bounded just above.
        let length = fields.size as usize;
        match fields.format {
            FLAT_INLINE => self.children.get(position + (INODE_SIZE + fields.xattr_bytes) as u64, length),
            _ => self.contents.get(u64::from(fields.union) * BLOCK_SIZE as u64, length),
        }
        .map(Into::into)
    }

    /// Reads the names in the directory `nid`.
    fn fill(&mut self, nid: u64, id: InodeId) -> Result<(), ReadError> {
        let position = self.position(nid)?;
        let fields = inode(&mut self.parents, position)?;
        let (mut left, mut next) = (fields.size, u64::from(fields.union) * BLOCK_SIZE as u64);
        while left > 0 {
            let length = left.min(BLOCK_SIZE as u64);
            let inline = fields.format == FLAT_INLINE && left < BLOCK_SIZE as u64;
            // At most a block.
            let block = match inline {
                true => self.parents.get(position + (INODE_SIZE + fields.xattr_bytes) as u64, length as usize),
                false => self.contents.get(next, length as usize),
            }?;
            let entries = decode_dirents(block).ok_or(ReadError::Malformed("a directory in it is malformed"))?;
            let entries: Vec<_> = entries.into_iter().map(|(name, nid)| (Box::<[u8]>::from(name), nid)).collect();
            (left, next) = (left - length, next + length);
            for (name, nid) in entries {
                self.name(id, name, nid)?;
            }
        }
        Ok(())
    }

    fn name(&mut self, directory: InodeId, name: Box<[u8]>, nid: u64) -> Result<(), ReadError> {
        if matches!(&*name, b"." | b"..") {
            return Ok(());
        }
        if name.is_empty() || name.contains(&b'/') {
            return Err(ReadError::Malformed("a directory in it has a name that is none"));
        }
        self.names_left = self.names_left.checked_sub(1).ok_or(ReadError::TooMany)?;
        let child = self.add(nid)?;
        match self.tree.entries_mut(directory).insert(name, child) {
            None => Ok(()),
            Some(_) => Err(ReadError::Malformed("a directory in it has a name twice")),
        }
    }

    fn position(&self, nid: u64) -> Result<u64, ReadError> {
        let position = nid.checked_mul(SLOT).and_then(|offset| self.metadata.checked_add(offset));
        position.ok_or(ReadError::Malformed("it names an inode beyond its end"))
    }
}

fn inode(window: &mut Window<'_>, position: u64) -> Result<InodeFields, ReadError> {
    let bytes = window.get(position, INODE_SIZE)?.first_chunk().expect("as long as was asked for");
    InodeFields::decode(bytes).ok_or(ReadError::Malformed("it has an inode of an unknown format"))
}

/// Whether `mark` is among the attributes, from which it is taken.
fn take_mark(xattrs: &mut Vec<Xattr>, mark: &[u8]) -> bool {
    let (index, name) = xattr_prefix(mark).expect("trusted. is a known prefix");
    let before = xattrs.len();
    xattrs.retain(|xattr| xattr.index != index || &*xattr.name != name);
    xattrs.len() < before
}

/// The reverse of [`FileType::device_number`].
fn device(number: u32, make: fn(u32, u32) -> FileType) -> FileType {
    make((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & 0xf_ff00))
}
