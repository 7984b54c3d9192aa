//! dm-verity's hash tree (Documentation/admin-guide/device-mapper/verity.rst): SHA-256 without salt, blocks of 4 KiB, version 1.
//!
//! ```text
//! data | highest level … level 1 | level 0: a hash for each block of data
//! ```
//! A block holds 128 hashes. As each file of an image's disk is a multiple of 128 blocks long, it has blocks of level 0 of its own,
//! which follow its data in the file:
//!
//! ```text
//! layer:          data | level 0
//! metadata file:  data | levels from the highest down to 1, of the whole disk | level 0
//! disk:           data of the metadata file, of each layer | levels … 1 | level 0 of the metadata file, of each layer
//! ```
//! So a layer's data are hashed once, when it is made, whatever images it is in.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest as _, Sha256};

use crate::erofs::{ALIGNMENT, BLOCK_SIZE};

/// Bytes of a hash.
const HASH: usize = 32;
/// Bytes of level 0 for [`ALIGNMENT`] bytes of data.
const LEVEL_0: u64 = BLOCK_SIZE as u64;

/// The hash of a block of data, or of hashes.
pub(crate) fn hash(block: &[u8]) -> [u8; HASH] {
    Sha256::digest(block).into()
}

/// Adds the hash of each block in `bytes` to `hashes`.
pub(crate) fn hash_blocks(bytes: &[u8], hashes: &mut Vec<u8>) {
    for block in bytes.chunks(BLOCK_SIZE) {
        hashes.extend_from_slice(&hash(block));
    }
}

/// Bytes of data in a layer's file of `length` bytes. `None`: no layer with hashes is of this length.
pub(crate) fn data_bytes(length: u64) -> Option<u64> {
    let pieces = length / (ALIGNMENT + LEVEL_0);
    (pieces > 0 && length.is_multiple_of(ALIGNMENT + LEVEL_0)).then_some(pieces * ALIGNMENT)
}

/// Bytes of level 0 for so many bytes of data, which are a multiple of [`ALIGNMENT`].
pub(crate) fn level_0_bytes(data: u64) -> u64 {
    data / ALIGNMENT * LEVEL_0
}

/// Appends level 0 to a file that has its name already, with `data` bytes of data. It is of the right length only when all but the
/// last block is durable.
pub(crate) fn append_level_0(file: &File, data: u64, hashes: &[u8]) -> io::Result<()> {
    debug_assert_eq!(hashes.len() as u64, level_0_bytes(data));
    let (most, last) = hashes.split_at(hashes.len() - BLOCK_SIZE);
    file.write_all_at(most, data)?;
    file.sync_all()?;
    file.write_all_at(last, data + most.len() as u64)?;
    file.sync_all()
}

/// The hash of each block of `file` up to byte `data`, a multiple of [`ALIGNMENT`].
pub(crate) fn hash_file(file: &File, data: u64) -> io::Result<Vec<u8>> {
    let mut piece = vec![0; ALIGNMENT as usize].into_boxed_slice();
    let mut hashes = Vec::new();
    for position in (0..data).step_by(ALIGNMENT as usize) {
        file.read_exact_at(&mut piece, position)?;
        hash_blocks(&piece, &mut hashes);
    }
    Ok(hashes)
}

/// Whether the blocks in `bytes`, which were read at `position` of a layer's file with `data` bytes of data, have the hashes in
/// its level 0.
pub(crate) fn matches(file: &File, data: u64, position: u64, bytes: &[u8]) -> io::Result<bool> {
    let mut hashes = Vec::new();
    hash_blocks(bytes, &mut hashes);
    let mut stored = vec![0; hashes.len()];
    file.read_exact_at(&mut stored, data + position / BLOCK_SIZE as u64 * HASH as u64)?;
    Ok(stored == hashes)
}

/// The hash of each block of level 0 in a layer's file with `data` bytes of data: its part of level 1.
pub(crate) fn level_1(file: &File, data: u64) -> io::Result<Vec<u8>> {
    let (mut block, mut hashes) = ([0; BLOCK_SIZE], Vec::new());
    for position in (data..data + level_0_bytes(data)).step_by(BLOCK_SIZE) {
        file.read_exact_at(&mut block, position)?;
        hash_blocks(&block, &mut hashes);
    }
    Ok(hashes)
}

/// The levels above level 0, the highest first as they are on the disk, and the root hash. `level_1` has the hash of each block
/// of level 0, at least two.
pub(crate) fn upper_levels(mut level_1: Vec<u8>) -> (Vec<u8>, [u8; HASH]) {
    let mut levels = Vec::new();
    loop {
        level_1.resize(level_1.len().next_multiple_of(BLOCK_SIZE), 0);
        if level_1.len() == BLOCK_SIZE {
            let root = hash(&level_1);
            levels.push(level_1);
            return (levels.into_iter().rev().flatten().collect(), root);
        }
        let mut above = Vec::new();
        hash_blocks(&level_1, &mut above);
        levels.push(std::mem::replace(&mut level_1, above));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_level_comes_first_and_its_hash_is_the_root() {
        let level_1 = |count: usize| -> Vec<u8> { (0..count).flat_map(|index| hash(&index.to_le_bytes())).collect() };
        // 128 hashes are one block, which is the highest.
        let (tail, root) = upper_levels(level_1(128));
        assert_eq!((&tail, root), (&level_1(128), hash(&tail)));
        let (tail, root) = upper_levels(level_1(129));
        let (top, below) = tail.split_at(BLOCK_SIZE);
        assert_eq!(root, hash(top));
        assert_eq!(top[..2 * HASH], [hash(&below[..BLOCK_SIZE]), hash(&below[BLOCK_SIZE..])].concat());
        assert!(top[2 * HASH..].iter().chain(&below[129 * HASH..]).all(|byte| *byte == 0));
        assert_eq!(below[..129 * HASH], level_1(129));
        assert_eq!(below.len(), 2 * BLOCK_SIZE);
    }

    #[test]
    fn only_lengths_with_hashes_are_those_of_layers() {
        assert_eq!(data_bytes(129 * 4096), Some(ALIGNMENT));
        assert_eq!(data_bytes(3 * 129 * 4096), Some(3 * ALIGNMENT));
        for length in [0, ALIGNMENT, 129 * 4096 - 1, 129 * 4096 + 512] {
            assert_eq!(data_bytes(length), None, "{length}");
        }
    }
}
