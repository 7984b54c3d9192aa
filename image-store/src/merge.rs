//! The layers of an image as one EROFS file system on one disk.
//!
//! ```text
//! metadata file | layer 1 (bottom) | layer 2 | … | hash tree
//! ```
//! The metadata file has the superblock and all inodes, names and attributes of the merged tree; the data of its files stay where
//! they are, in the layers' files, and are addressed by their block of the disk. Each file's data are a multiple of
//! [`ALIGNMENT`] long. How the hash tree is put together of what the files have behind their data says `verity.rs`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use isopod_proto::ErrorKind;

use crate::config::Limits;
use crate::erofs::{
    ALIGNMENT, BLOCK_SIZE, Data, ErofsWriter, MergeLimits, ReadError, TooMuch, Tree, Written, data_bytes, read_tree,
};
use crate::image::Verity;
use crate::layer::is_disk_full;
use crate::verity;

/// Why layers cannot be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A layer's file cannot be read.
    #[error("the layer {path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer's file is not what was written.
    #[error("the layer {path} is damaged: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// Something is above its limit.
    #[error("the layers together have more than the {limit} {what} allowed")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The metadata file cannot be written.
    #[error("the merged metadata cannot be written")]
    Write {
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl MergeError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { .. } => ErrorKind::Internal,
            Self::Damaged { .. } => ErrorKind::Corrupt,
            Self::Limit { .. } => ErrorKind::ResourceExhausted,
            Self::Write { source } if is_disk_full(source) => ErrorKind::ResourceExhausted,
            Self::Write { .. } => ErrorKind::Internal,
        }
    }
}

/// What was merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merged {
    /// Bytes of the metadata file that come first on the disk; what follows them comes after the layers' data.
    pub metadata_bytes: u64,
    /// What the whole disk is verified with.
    pub verity: Verity,
}

/// Writes the metadata file of `layers`, which are files as [`crate::convert_blob`] makes them, bottom first, to the new file
/// `output`, as a pull does, but without syncing it.
pub fn merge_layers(layers: &[PathBuf], output: &Path, limits: &Limits) -> Result<Merged, MergeError> {
    let write = |source| MergeError::Write { source };
    let file = File::options().read(true).write(true).create_new(true).open(output).map_err(write)?;
    merge(layers, file, [0; 16], limits).map(|(_, merged)| merged)
}

/// The same, to `file`, which is new and empty, as a file system with this UUID.
pub(crate) fn merge(
    layers: &[PathBuf],
    file: File,
    uuid: [u8; 16],
    limits: &Limits,
) -> Result<(File, Merged), MergeError> {
    let mut left = MergeLimits::new(limits.max_entries, limits.max_metadata_bytes);
    let mut stack = Stack { tree: Tree::merged(), blocks: 0, level_1: Vec::new() };
    for path in layers {
        stack.add(path, limits, &mut left)?;
    }
    let write = |source| MergeError::Write { source };
    let writer = ErofsWriter::new(file).map_err(write)?;
    let written = writer.finish(&stack.tree, uuid, Data::Behind(stack.blocks)).map_err(write)?;
    let Written { file, bytes, hashes } = written;
    let metadata_bytes = bytes.next_multiple_of(ALIGNMENT);
    let mut level_1 = Vec::new();
    verity::hash_blocks(&hashes, &mut level_1);
    level_1.extend(stack.level_1);
    let (mut tail, root_hash) = verity::upper_levels(level_1);
    tail.extend(hashes);
    file.write_all_at(&tail, metadata_bytes).map_err(write)?;
    let data_blocks = metadata_bytes / BLOCK_SIZE as u64 + u64::from(stack.blocks);
    Ok((file, Merged { metadata_bytes, verity: Verity { root_hash, data_blocks } }))
}

/// The layers so far.
struct Stack {
    tree: Tree,
    /// Of their data, together.
    blocks: u32,
    /// The hashes of the blocks of their level 0.
    level_1: Vec<u8>,
}

impl Stack {
    fn add(&mut self, path: &Path, limits: &Limits, left: &mut MergeLimits) -> Result<(), MergeError> {
        let read = |source| MergeError::Read { path: path.to_owned(), source };
        let damaged = |problem| MergeError::Damaged { path: path.to_owned(), problem };
        let too_much = |TooMuch { what, limit }| MergeError::Limit { what, limit };
        // Names are of entries, or of directories that these imply.
        let max_names = limits.max_entries.saturating_mul(2);
        let failed = |error| match error {
            ReadError::Io(source) => read(source),
            ReadError::Malformed(problem) => damaged(problem),
            ReadError::TooMany => too_much(TooMuch { what: "names", limit: max_names }),
        };
        let file = File::open(path).map_err(read)?;
        let data = verity::data_bytes(file.metadata().map_err(read)?.len());
        let data = data.ok_or_else(|| damaged("it has no length that a layer has"))?;
        if data_bytes(&file).map_err(failed)? != data {
            return Err(damaged("its file system is of another length"));
        }
        let layer = read_tree(&file, max_names).map_err(failed)?;
        self.tree.merge(layer, self.blocks, left).map_err(too_much)?;
        self.level_1.extend(verity::level_1(&file, data).map_err(read)?);
        let blocks = u32::try_from(data / BLOCK_SIZE as u64).ok().and_then(|blocks| self.blocks.checked_add(blocks));
        self.blocks = blocks.ok_or(MergeError::Limit { what: "blocks", limit: u64::from(u32::MAX) })?;
        Ok(())
    }
}
