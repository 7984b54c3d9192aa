//! The writer: file data as they come, then everything else.

use std::fs::File;
use std::io;

use super::format::{
    ALIGNMENT, BLOCK_SIZE, FLAT_INLINE, FLAT_PLAIN, INODE_SIZE, InodeFields, SLOT, Superblock, encode_dirents,
    encode_xattrs, split_directory, xattr_size,
};
use super::output::{Output, Written};
use super::tree::{Content, FileType, Inode, InodeId, ROOT, Tree};

/// The first slot that an inode may have. Not 0, which some programs take for "no inode".
const FIRST_NID: u64 = 2;
const DIRECTORY_TYPE: u8 = 2;

/// Where the data of the files in a tree are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    /// They were written to the same file, and their blocks are its.
    Own,
    /// So many blocks that follow the file on its disk, from which the tree's blocks are counted.
    Behind(u32),
}

/// Writes one file system to a new file.
pub(crate) struct ErofsWriter {
    out: Output,
}

impl ErofsWriter {
    /// Starts a file system in `file`, which is empty.
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let mut out = Output::new(file)?;
        // The superblock's place; it is written last, so that a file that was cut short has none.
        out.write(&[0; BLOCK_SIZE])?;
        Ok(Self { out })
    }

    /// The block the next file's data start at.
    pub(crate) fn begin_data(&self) -> io::Result<u32> {
        block_number(self.out.position())
    }

    /// Adds to the current file's data.
    pub(crate) fn write_data(&mut self, data: &[u8]) -> io::Result<()> {
        self.out.write(data)
    }

    /// Ends the current file's data.
    pub(crate) fn end_data(&mut self) -> io::Result<()> {
        self.out.end_block()
    }

    /// Writes the metadata of `tree` and the superblock. A hole at the file's end makes its
    /// length a multiple of [`ALIGNMENT`].
    pub(crate) fn finish(mut self, tree: &Tree, uuid: [u8; 16], data: Data) -> io::Result<Written> {
        let start = self.out.position();
        let meta_block = block_number(start)?;
        let layout = Layout::new(tree, start, data)?;
        for (index, id) in layout.order.iter().enumerate() {
            let place = layout.place(*id);
            self.out.pad_to(start + place.nid * SLOT)?;
            self.write_inode(tree, &layout, *id, index)?;
        }
        self.out.pad_to(start + layout.metadata_bytes)?;
        for id in &layout.order {
            self.write_blocks(tree, &layout, *id)?;
        }
        let superblock = Superblock {
            root_nid: u16::try_from(layout.place(ROOT).nid).expect("the root is in the first two blocks"),
            inodes: layout.order.len() as u64,
            blocks: layout.blocks,
            meta_block,
            uuid,
        };
        self.out.finish(&superblock.encode())
    }

    fn write_inode(&mut self, tree: &Tree, layout: &Layout, id: InodeId, index: usize) -> io::Result<()> {
        let (inode, place) = (&tree.inodes[id.0], layout.place(id));
        let attributes = &inode.attributes;
        let xattrs = encode_xattrs(&inode.xattrs());
        let (type_bits, union) = match &inode.content {
            Content::Directory { .. } => (0o040_000, place.first_block),
            Content::File(file @ FileType::Regular { first_block, size }) => {
                (file.mode_bits(), if *size > 0 { first_block + layout.data_base } else { 0 })
            }
            Content::File(file @ FileType::Symlink(_)) => (file.mode_bits(), place.first_block),
            Content::File(file) => (file.mode_bits(), file.device_number()),
        };
        let fields = InodeFields {
            format: if place.inline { FLAT_INLINE } else { FLAT_PLAIN },
            xattr_bytes: xattrs.len(),
            mode: type_bits | attributes.mode,
            size: place.size,
            union,
            // For 32-bit stat; bounded by the limit on entries.
            ino: index as u32 + 1,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: attributes.mtime,
            mtime_nanos: attributes.mtime_nanos,
            nlink: place.nlink,
        };
        self.out.write(&fields.encode())?;
        self.out.write(&xattrs)?;
        if place.inline {
            let tail = match &inode.content {
                Content::File(FileType::Symlink(target)) => target.to_vec(),
                _ => layout.directory_blocks(tree, id).pop().unwrap_or_default(),
            };
            self.out.write(&tail)?;
        }
        Ok(())
    }

    /// Writes the blocks of a directory or a symbolic link that are not inline.
    fn write_blocks(&mut self, tree: &Tree, layout: &Layout, id: InodeId) -> io::Result<()> {
        let place = layout.place(id);
        if place.blocks == 0 {
            return Ok(());
        }
        debug_assert_eq!(block_number(self.out.position())?, place.first_block);
        let mut blocks = match &tree.inodes[id.0].content {
            Content::Directory { .. } => layout.directory_blocks(tree, id),
            Content::File(FileType::Symlink(target)) => vec![target.to_vec()],
            Content::File(_) => Vec::new(),
        };
        blocks.truncate(place.blocks as usize);
        for block in blocks {
            self.out.write(&block)?;
            self.out.end_block()?;
        }
        Ok(())
    }
}

/// Where everything goes that is written after the data.
struct Layout {
    /// The inodes that have a name, breadth first.
    order: Vec<InodeId>,
    /// By inode number of the tree.
    places: Vec<Option<Place>>,
    /// By inode number of the tree; for directories.
    parents: Vec<InodeId>,
    /// Bytes of the metadata area, in whole blocks.
    metadata_bytes: u64,
    /// The block of the disk that the tree's data are counted from.
    data_base: u32,
    /// Blocks of the disk.
    blocks: u32,
}

#[derive(Clone)]
struct Place {
    nid: u64,
    size: u64,
    inline: bool,
    /// Blocks written after the metadata, and the first of them.
    blocks: u32,
    first_block: u32,
    nlink: u32,
}

impl Layout {
    /// The layout of `tree` with the metadata area at byte `start`.
    fn new(tree: &Tree, start: u64, data: Data) -> io::Result<Self> {
        let count = tree.inodes.len();
        let mut layout = Self {
            order: Vec::new(),
            places: vec![None; count],
            parents: vec![ROOT; count],
            metadata_bytes: 0,
            data_base: 0,
            blocks: 0,
        };
        layout.order.push(ROOT);
        let mut position = FIRST_NID * SLOT;
        layout.places[ROOT.0] = Some(layout.place_inode(&tree.inodes[ROOT.0], &mut position));
        let mut next = 0;
        while let Some(parent) = layout.order.get(next).copied() {
            next += 1;
            let Content::Directory { entries, .. } = &tree.inodes[parent.0].content else { continue };
            for child in entries.values() {
                if let Some(place) = &mut layout.places[child.0] {
                    place.nlink += 1;
                    continue;
                }
                let inode = &tree.inodes[child.0];
                layout.places[child.0] = Some(layout.place_inode(inode, &mut position));
                layout.order.push(*child);
                if matches!(inode.content, Content::Directory { .. }) {
                    layout.parents[child.0] = parent;
                    let place = layout.places[parent.0].as_mut().expect("a parent is placed before its children");
                    place.nlink += 1;
                }
            }
        }
        // fsck.erofs 1.5 looks for attributes behind the last inode even where there are none.
        layout.metadata_bytes = (position + SLOT).next_multiple_of(BLOCK_SIZE as u64);
        let mut block = block_number(start + layout.metadata_bytes)?;
        for id in &layout.order {
            let place = layout.places[id.0].as_mut().expect("all in the order are placed");
            if place.blocks > 0 {
                place.first_block = block;
                block = block.checked_add(place.blocks).ok_or_else(too_large)?;
            }
        }
        (layout.data_base, layout.blocks) = match data {
            Data::Own => (0, block),
            Data::Behind(blocks) => {
                let base = block_number((u64::from(block) * BLOCK_SIZE as u64).next_multiple_of(ALIGNMENT))?;
                (base, base.checked_add(blocks).ok_or_else(too_large)?)
            }
        };
        Ok(layout)
    }

    /// Finds a place at or after `position`, and moves that behind it. What is inline must be in the inode's own block, and
    /// no inode may cross the end of one.
    fn place_inode(&self, inode: &Inode, position: &mut u64) -> Place {
        let head = INODE_SIZE + xattr_size(&inode.xattrs());
        let (size, blocks, tail, nlink) = match &inode.content {
            Content::Directory { entries, .. } => {
                let (blocks, used) = split_directory(with_dots(entries.keys().map(|name| &**name)).into_iter());
                ((blocks.len() - 1) as u64 * BLOCK_SIZE as u64 + used as u64, blocks.len() as u32, used, 2)
            }
            Content::File(FileType::Symlink(target)) => (target.len() as u64, 1, target.len(), 1),
            Content::File(FileType::Regular { size, .. }) => (*size, 0, 0, 1),
            Content::File(_) => (0, 0, 0, 1),
        };
        let inline = blocks > 0 && head + tail <= BLOCK_SIZE;
        let taken = if inline { head + tail } else { head };
        let together = if inline { taken } else { INODE_SIZE };
        let in_block = (*position % BLOCK_SIZE as u64) as usize;
        if in_block + together > BLOCK_SIZE {
            *position = position.next_multiple_of(BLOCK_SIZE as u64);
        }
        let nid = *position / SLOT;
        *position = (*position + taken as u64).next_multiple_of(SLOT);
        Place { nid, size, inline, blocks: if inline { blocks - 1 } else { blocks }, first_block: 0, nlink }
    }

    fn place(&self, id: InodeId) -> &Place {
        self.places[id.0].as_ref().expect("only inodes in the order are asked for")
    }

    /// The contents of a directory, block by block, without padding.
    fn directory_blocks(&self, tree: &Tree, id: InodeId) -> Vec<Vec<u8>> {
        let Content::Directory { entries, .. } = &tree.inodes[id.0].content else { return Vec::new() };
        let names = with_dots(entries.keys().map(|name| &**name));
        let dirents: Vec<_> = names
            .iter()
            .map(|name| {
                let target = match *name {
                    b"." => id,
                    b".." => self.parents[id.0],
                    name => entries[name],
                };
                let file_type = match &tree.inodes[target.0].content {
                    Content::Directory { .. } => DIRECTORY_TYPE,
                    Content::File(file) => file.dirent_type(),
                };
                (*name, self.place(target).nid, file_type)
            })
            .collect();
        let mut rest = &dirents[..];
        let (counts, _) = split_directory(names.into_iter());
        let mut blocks = Vec::with_capacity(counts.len());
        for count in counts {
            let (block, after) = rest.split_at(count);
            blocks.push(encode_dirents(block));
            rest = after;
        }
        blocks
    }
}

/// The names with `.` and `..`, in the order of their bytes.
fn with_dots<'a>(names: impl Iterator<Item = &'a [u8]>) -> Vec<&'a [u8]> {
    let mut names: Vec<&[u8]> = names.chain([&b"."[..], b".."]).collect();
    names.sort_unstable();
    names
}

/// The number of the block at byte `position`, which is a block's start.
fn block_number(position: u64) -> io::Result<u32> {
    u32::try_from(position / BLOCK_SIZE as u64).map_err(|_| too_large())
}

fn too_large() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, "an EROFS file system has at most 2^32 blocks")
}
