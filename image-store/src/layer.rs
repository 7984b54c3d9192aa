//! One layer: from compressed tar to EROFS, verified.

mod archive;
mod convert;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod pipeline;

use std::io;

use isopod_proto::ErrorKind;

use crate::digest::Digest;

pub(crate) use self::archive::{TarKind, TarReader};
use self::convert::convert;
#[cfg(feature = "fuzzing")]
pub(crate) use self::pipeline::inflate_pieces;
pub(crate) use self::pipeline::{BlobSender, LayerJob, start};
pub use self::pipeline::{ConvertReport, convert_blob};

/// Why a layer cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The bytes cannot be read.
    #[error("the layer's bytes cannot be read")]
    Input {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Whoever sends the bytes has given up.
    #[error("the layer's bytes stopped coming")]
    Cancelled,
    /// What is compressed is malformed or incomplete.
    #[error("the layer cannot be decompressed after {bytes} bytes of output{}", truncated(.source))]
    Decompress {
        /// Bytes that came out before.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tar stream is malformed.
    #[error("the layer's tar is malformed at byte {offset}: {problem}")]
    Tar {
        /// Where.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// An entry is not acceptable.
    #[error("the layer's tar entry {path:?} {problem}")]
    Entry {
        /// Its name.
        path: String,
        /// What is wrong, as a phrase that follows the name.
        problem: String,
    },
    /// Something is above its limit.
    #[error("the layer has more than the {limit} {what} allowed")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The blob is not what its digest says.
    #[error("the layer's blob has digest {actual}, not {expected}")]
    BlobDigest {
        /// The digest in the manifest.
        expected: Digest,
        /// That of the bytes.
        actual: Digest,
    },
    /// The tar is not what its diff id says.
    #[error("the layer's tar has digest {actual}, not the diff id {expected}")]
    DiffId {
        /// The digest in the image's configuration.
        expected: Digest,
        /// That of the bytes.
        actual: Digest,
    },
    /// The EROFS file cannot be written.
    #[error("the layer cannot be written{}", disk_full(.source))]
    Write {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread cannot be started, or died.
    #[error("the layer's thread {problem}")]
    Thread {
        /// What happened.
        problem: &'static str,
    },
}

fn truncated(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::UnexpectedEof { ": it is truncated" } else { "" }
}

fn disk_full(error: &io::Error) -> &'static str {
    if is_disk_full(error) { ": the disk is full" } else { "" }
}

/// Whether `error` says that there is no room.
pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

impl LayerError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Input { .. } | Self::Cancelled => ErrorKind::Unavailable,
            Self::Decompress { .. }
            | Self::Tar { .. }
            | Self::Entry { .. }
            | Self::BlobDigest { .. }
            | Self::DiffId { .. } => ErrorKind::Corrupt,
            Self::Limit { .. } => ErrorKind::ResourceExhausted,
            Self::Write { source } if is_disk_full(source) => ErrorKind::ResourceExhausted,
            Self::Write { .. } | Self::Thread { .. } => ErrorKind::Internal,
        }
    }

    pub(crate) fn entry(path: &[u8], problem: impl Into<String>) -> Self {
        let shown: Vec<u8> = path.iter().take(300).copied().collect();
        Self::Entry { path: String::from_utf8_lossy(&shown).into_owned(), problem: problem.into() }
    }
}
