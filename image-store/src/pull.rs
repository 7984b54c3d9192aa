//! Pulling an image.

use isopod_proto::ErrorKind;

/// Why an image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry has no such image.
    #[error("image {reference:?} does not exist in its registry")]
    NotFound {
        /// What was asked for.
        reference: String,
    },
}

impl PullError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
        }
    }
}
