//! Why a store cannot be opened, or cannot answer.

use std::io;
use std::path::{Path, PathBuf};

use isopod_proto::ErrorKind;

use super::files::VERSION;
use crate::digest::ImageId;
use crate::merge::MergeError;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The configuration cannot be used.
    #[error("image store configuration: {problem}")]
    Config {
        /// What is wrong.
        problem: String,
    },
    /// The directory holds something else, or what another version made.
    #[error("{path} does not say {VERSION:?}: this is no image store, or one of another version")]
    Version {
        /// The version file.
        path: PathBuf,
    },
    /// Another process has it open.
    #[error("image store {root} is in use by another process")]
    InUse {
        /// The store.
        root: PathBuf,
    },
    /// The database cannot be opened.
    #[error("image database {path} cannot be opened")]
    Database {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: redb::Error,
    },
    /// A file or directory cannot be made or read.
    #[error("image store: {path} cannot be made or read")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is stored cannot be read.
    #[error("image store {root} cannot be put in order")]
    Store {
        /// The store.
        root: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
}

/// Why the store cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such image.
    #[error("there is no image {reference:?}")]
    NotFound {
        /// What was asked for.
        reference: String,
    },
    /// More than one image has an id with this prefix.
    #[error("{reference:?} is the start of the ids of more than one image")]
    Ambiguous {
        /// What was asked for.
        reference: String,
    },
    /// The database failed.
    #[error("the image database cannot be {verb}")]
    Database {
        /// What was tried: "read" or "written".
        verb: &'static str,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// The layers of an image do not make a file system.
    #[error("the layers of image {image} cannot be merged")]
    Merge {
        /// Its id.
        image: ImageId,
        /// Why.
        #[source]
        source: MergeError,
    },
    /// A file is not as long as it must be.
    #[error("image store: {path} is not of its length")]
    Length {
        /// Which file.
        path: PathBuf,
    },
    /// A file failed.
    #[error("image store: {path} cannot be {verb}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        verb: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl OpenError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } => ErrorKind::InvalidArgument,
            Self::Version { .. } | Self::InUse { .. } => ErrorKind::FailedPrecondition,
            Self::Database { .. } | Self::Io { .. } => ErrorKind::Internal,
            Self::Store { source, .. } => source.kind(),
        }
    }
}

impl StoreError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. } => ErrorKind::InvalidArgument,
            Self::Database { source, .. } => match &**source {
                redb::Error::Io(error) if crate::layer::is_disk_full(error) => ErrorKind::ResourceExhausted,
                redb::Error::Corrupted(_) => ErrorKind::Corrupt,
                _ => ErrorKind::Internal,
            },
            Self::Merge { source, .. } => source.kind(),
            Self::Length { .. } => ErrorKind::Corrupt,
            Self::Io { source, .. } if crate::layer::is_disk_full(source) => ErrorKind::ResourceExhausted,
            Self::Io { .. } => ErrorKind::Internal,
        }
    }
}

pub(super) fn database_error(verb: &'static str) -> impl FnOnce(redb::Error) -> StoreError {
    move |source| StoreError::Database { verb, source: Box::new(source) }
}

pub(super) fn io_error(path: &Path, verb: &'static str) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { path, verb, source }
}
