//! The on-disk structures, encoded (kernel: fs/erofs/erofs_fs.h). Everything is little endian.

/// Bytes of a block.
pub(crate) const BLOCK_SIZE: usize = 4096;
/// What the length of every file system's file is a multiple of, in bytes: what one block of a dm-verity tree covers, 128 hashes
/// of 32 bytes, so that files can follow each other on a disk and each has hash blocks of its own.
pub(crate) const ALIGNMENT: u64 = 128 * BLOCK_SIZE as u64;
/// Bytes of an inode's slot; an inode's number (nid) is its offset in the metadata area in slots.
pub(super) const SLOT: u64 = 32;
/// Bytes of `struct erofs_inode_extended`.
pub(super) const INODE_SIZE: usize = 64;
/// Bytes of `struct erofs_dirent`.
pub(super) const DIRENT_SIZE: usize = 12;
/// `i_format` of an extended inode whose data are in blocks.
pub(super) const FLAT_PLAIN: u16 = 1;
/// `i_format` of an extended inode whose last, partial block follows the inode.
pub(super) const FLAT_INLINE: u16 = 1 | (2 << 1);

const MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK_OFFSET: usize = 1024;
/// EROFS_FEATURE_COMPAT_SB_CHKSUM and EROFS_FEATURE_COMPAT_MTIME.
const FEATURE_COMPAT: u32 = 0x1 | 0x2;
const XATTR_HEADER: usize = 12;

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Xattr {
    /// Which prefix the name has (`e_name_index`).
    pub index: u8,
    /// The name after the prefix; at most 255 bytes.
    pub name: Box<[u8]>,
    /// At most 65535 bytes.
    pub value: Box<[u8]>,
}

/// The `e_name_index` of a full name, and what follows its prefix. `None`: a name Linux file systems do not take.
pub(crate) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    let prefixes: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    let (prefix, index) = prefixes.into_iter().find(|(prefix, _)| name.starts_with(prefix))?;
    let rest = &name[prefix.len()..];
    (1..=255).contains(&rest.len()).then_some((index, rest))
}

/// The fields of an inode that differ.
pub(super) struct InodeFields {
    pub format: u16,
    pub xattr_bytes: usize,
    pub mode: u16,
    pub size: u64,
    /// The first data block, or the device number.
    pub union: u32,
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nanos: u32,
    pub nlink: u32,
}

impl InodeFields {
    /// The fields in `bytes`. `None`: an inode that this module does not write.
    pub(super) fn decode(bytes: &[u8; INODE_SIZE]) -> Option<Self> {
        let format = u16_at(bytes, 0);
        let xattr_bytes = match usize::from(u16_at(bytes, 2)) {
            0 => 0,
            count => XATTR_HEADER + (count - 1) * 4,
        };
        matches!(format, FLAT_PLAIN | FLAT_INLINE).then(|| Self {
            format,
            xattr_bytes,
            mode: u16_at(bytes, 4),
            size: u64_at(bytes, 8),
            union: u32_at(bytes, 16),
            ino: u32_at(bytes, 20),
            uid: u32_at(bytes, 24),
            gid: u32_at(bytes, 28),
            mtime: u64_at(bytes, 32).cast_signed(),
            mtime_nanos: u32_at(bytes, 40),
            nlink: u32_at(bytes, 44),
        })
    }

    /// `struct erofs_inode_extended`.
    pub(super) fn encode(&self) -> [u8; INODE_SIZE] {
        let mut bytes = [0; INODE_SIZE];
        let xattr_count = match self.xattr_bytes {
            0 => 0,
            // The tree keeps attributes below 64 KiB, so this fits.
            count => ((count - XATTR_HEADER) / 4 + 1) as u16,
        };
        bytes[0..2].copy_from_slice(&self.format.to_le_bytes());
        bytes[2..4].copy_from_slice(&xattr_count.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.mode.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.size.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.union.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.ino.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.uid.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.gid.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.mtime.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.mtime_nanos.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.nlink.to_le_bytes());
        bytes
    }
}

/// Bytes the attributes take after their inode.
pub(super) fn xattr_size(xattrs: &[Xattr]) -> usize {
    let entry = |xattr: &Xattr| (4 + xattr.name.len() + xattr.value.len()).next_multiple_of(4);
    match xattrs {
        [] => 0,
        _ => XATTR_HEADER + xattrs.iter().map(entry).sum::<usize>(),
    }
}

/// `struct erofs_xattr_ibody_header` without shared attributes, and the entries.
pub(super) fn encode_xattrs(xattrs: &[Xattr]) -> Vec<u8> {
    if xattrs.is_empty() {
        return Vec::new();
    }
    let mut bytes = vec![0; XATTR_HEADER];
    for xattr in xattrs {
        // Both lengths are kept in bounds by the tree.
        bytes.push(xattr.name.len() as u8);
        bytes.push(xattr.index);
        bytes.extend_from_slice(&(xattr.value.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&xattr.name);
        bytes.extend_from_slice(&xattr.value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// What [`encode_xattrs`] has encoded. `None`: something else.
pub(super) fn decode_xattrs(bytes: &[u8]) -> Option<Vec<Xattr>> {
    let mut xattrs = Vec::new();
    let mut rest = match bytes {
        [] => bytes,
        _ => bytes.get(XATTR_HEADER..)?,
    };
    while !rest.is_empty() {
        let [name_length, index, low, high] = *rest.first_chunk()?;
        let name_end = 4 + usize::from(name_length);
        let value_end = name_end + usize::from(u16::from_le_bytes([low, high]));
        let (name, value) = (rest.get(4..name_end)?, rest.get(name_end..value_end)?);
        xattrs.push(Xattr { index, name: name.into(), value: value.into() });
        rest = rest.get(value_end.next_multiple_of(4)..)?;
    }
    Some(xattrs)
}

/// Splits the names of a directory, sorted and with the dots, into blocks: how many names each holds, and how many bytes of
/// the last one are used.
pub(super) fn split_directory<'a>(names: impl Iterator<Item = &'a [u8]>) -> (Vec<usize>, usize) {
    let (mut blocks, mut count, mut used) = (Vec::new(), 0, 0);
    for name in names {
        let size = DIRENT_SIZE + name.len();
        if used + size > BLOCK_SIZE {
            blocks.push(count);
            (count, used) = (0, 0);
        }
        count += 1;
        used += size;
    }
    blocks.push(count);
    (blocks, used)
}

/// One block of a directory, without padding: `struct erofs_dirent` for each name, then the names.
pub(super) fn encode_dirents(entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK_SIZE);
    let mut name_offset = entries.len() * DIRENT_SIZE;
    for (name, nid, file_type) in entries {
        bytes.extend_from_slice(&nid.to_le_bytes());
        // Within a block, so it fits.
        bytes.extend_from_slice(&(name_offset as u16).to_le_bytes());
        bytes.extend_from_slice(&[*file_type, 0]);
        name_offset += name.len();
    }
    for (name, ..) in entries {
        bytes.extend_from_slice(name);
    }
    bytes
}

/// The names and inode numbers in one block of a directory, dots included. `None`: it is no such block.
pub(super) fn decode_dirents(block: &[u8]) -> Option<Vec<(&[u8], u64)>> {
    let offset = |index: usize| Some(usize::from(u16_at(block.get(index * DIRENT_SIZE..)?.first_chunk::<10>()?, 8)));
    let first = offset(0)?;
    if first == 0 || !first.is_multiple_of(DIRENT_SIZE) {
        return None;
    }
    let count = first / DIRENT_SIZE;
    let mut entries = Vec::with_capacity(count);
    for index in 0..count {
        let nid = u64_at(block.get(index * DIRENT_SIZE..)?.first_chunk::<8>()?, 0);
        let end = if index + 1 < count { offset(index + 1)? } else { block.len() };
        let name = block.get(offset(index)?..end)?;
        // The last name of a block that is not the directory's last ends with the first NUL, or the block.
        entries.push((name.split(|byte| *byte == 0).next()?, nid));
    }
    Some(entries)
}

fn u16_at<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

/// The fields of the superblock that differ.
pub(super) struct Superblock {
    pub root_nid: u16,
    pub inodes: u64,
    pub blocks: u32,
    pub meta_block: u32,
    pub uuid: [u8; 16],
}

impl Superblock {
    /// Block 0.
    pub(super) fn encode(&self) -> [u8; BLOCK_SIZE] {
        let mut block = [0; BLOCK_SIZE];
        let bytes = &mut block[SUPERBLOCK_OFFSET..];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..12].copy_from_slice(&FEATURE_COMPAT.to_le_bytes());
        bytes[12] = BLOCK_SIZE.trailing_zeros() as u8;
        bytes[14..16].copy_from_slice(&self.root_nid.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.inodes.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.blocks.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.meta_block.to_le_bytes());
        bytes[48..64].copy_from_slice(&self.uuid);
        let checksum = checksum(bytes);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    /// The superblock in block 0. `None`: none that this module has written.
    pub(super) fn decode(block: &[u8; BLOCK_SIZE]) -> Option<Self> {
        let mut block = *block;
        let stored = u32_at(&block, SUPERBLOCK_OFFSET + 4);
        let bytes = &mut block[SUPERBLOCK_OFFSET..];
        bytes[4..8].fill(0);
        let sum = checksum(bytes);
        let bytes = bytes.first_chunk::<128>()?;
        let ours = u32_at(bytes, 0) == MAGIC
            && sum == stored
            && u32_at(bytes, 8) == FEATURE_COMPAT
            && usize::from(bytes[12]) == BLOCK_SIZE.trailing_zeros() as usize
            // No incompatible features.
            && u32_at(bytes, 80) == 0;
        ours.then(|| Self {
            root_nid: u16_at(bytes, 14),
            inodes: u64_at(bytes, 16),
            blocks: u32_at(bytes, 36),
            meta_block: u32_at(bytes, 40),
            uuid: std::array::from_fn(|index| bytes[48 + index]),
        })
    }
}

/// The kernel's crc32c, which is seeded with all ones and not inverted at the end.
fn checksum(bytes: &[u8]) -> u32 {
    !crc32c::crc32c(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_split_at_block_ends() {
        // 4096 / (12 + 244) = 16 exactly.
        let name = [b'x'; 244];
        let names = |count| std::iter::repeat_n(&name[..], count);
        assert_eq!(split_directory(names(16)), (vec![16], 4096));
        assert_eq!(split_directory(names(17)), (vec![16, 1], 256));
    }

    #[test]
    fn attribute_names_have_the_prefixes_of_linux() {
        assert_eq!(xattr_prefix(b"security.capability"), Some((6, &b"capability"[..])));
        assert_eq!(xattr_prefix(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(xattr_prefix(b"user."), None);
        assert_eq!(xattr_prefix(b"com.apple.quarantine"), None);
        assert_eq!(xattr_prefix(&[&b"user."[..], &[b'x'; 256]].concat()), None);
    }
}
