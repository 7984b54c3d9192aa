//! The layers of an image as one EROFS file system on one disk.
//!
//! ```text
//! metadata file | layer 1 (bottom) | layer 2 | …
//! ```
//! The metadata file has the superblock and all inodes, names and attributes of the merged tree; the data of its files stay where
//! they are, in the layers' files, and are addressed by their block of the disk. Each file is a multiple of [`ALIGNMENT`] long.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use isopod_proto::ErrorKind;

use crate::config::Limits;
use crate::erofs::{ALIGNMENT, BLOCK_SIZE, Data, ErofsWriter, MergeLimits, ReadError, TooMuch, Tree, read_tree};
use crate::layer::is_disk_full;

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

/// Writes the metadata file of `layers`, which are EROFS files as [`crate::convert_blob`] makes them, bottom first, to the new
/// file `output`, as a pull does, but without syncing it. Gives its length in bytes.
pub fn merge_layers(layers: &[PathBuf], output: &Path, limits: &Limits) -> Result<u64, MergeError> {
    let write = |source| MergeError::Write { source };
    let file = File::options().read(true).write(true).create_new(true).open(output).map_err(write)?;
    Ok(merge(layers, file, [0; 16], limits)?.metadata().map_err(write)?.len())
}

/// The same, to `file`, which is new and empty, as a file system with this UUID.
pub(crate) fn merge(layers: &[PathBuf], file: File, uuid: [u8; 16], limits: &Limits) -> Result<File, MergeError> {
    let too_much = |TooMuch { what, limit }| MergeError::Limit { what, limit };
    let mut left = MergeLimits::new(limits.max_entries, limits.max_metadata_bytes);
    let (mut tree, mut base) = (Tree::merged(), 0);
    for path in layers {
        let read = |source| MergeError::Read { path: path.clone(), source };
        let damaged = |problem| MergeError::Damaged { path: path.clone(), problem };
        let layer = File::open(path).map_err(read)?;
        let length = layer.metadata().map_err(read)?.len();
        if !length.is_multiple_of(ALIGNMENT) || length == 0 {
            return Err(damaged("it has no length that a layer has"));
        }
        // Names are of entries, or of directories that these imply.
        let max_names = limits.max_entries.saturating_mul(2);
        let merged = read_tree(&layer, max_names).map_err(|error| match error {
            ReadError::Io(source) => read(source),
            ReadError::Malformed(problem) => damaged(problem),
            ReadError::TooMany => too_much(TooMuch { what: "names", limit: max_names }),
        })?;
        tree.merge(merged, base, &mut left).map_err(too_much)?;
        let blocks = u32::try_from(length / BLOCK_SIZE as u64).ok().and_then(|blocks| base.checked_add(blocks));
        base = blocks.ok_or(MergeError::Limit { what: "blocks", limit: u64::from(u32::MAX) })?;
    }
    let write = |source| MergeError::Write { source };
    let writer = ErofsWriter::new(file).map_err(write)?;
    let (file, _) = writer.finish(&tree, uuid, Data::Behind(base)).map_err(write)?;
    Ok(file)
}
