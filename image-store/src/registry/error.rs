//! Why a registry cannot be used as it is configured.

use std::io;
use std::path::PathBuf;

use isopod_proto::ErrorKind;

/// Why a registry cannot be used as it is configured, or with the credentials given.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A file that describes the registry, or a certificate or key it names, cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Such a file is too large.
    #[error("{path} has more than the {limit} bytes allowed")]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// The file is not TOML.
    #[error("{path} is not TOML")]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value in the file cannot be used.
    #[error("{path}: {key}: {problem}")]
    Value {
        /// Which file.
        path: PathBuf,
        /// Where in it, such as `host."https://mirror".ca`.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A certificate or key cannot be used.
    #[error("{path} {problem}")]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// What is wrong, as a phrase that follows its name.
        problem: String,
    },
    /// No host that is configured may do what the pull needs.
    #[error("none of the hosts that {path} has for {registry:?} has the capability {capability:?}")]
    Capability {
        /// The registry.
        registry: String,
        /// The file.
        path: PathBuf,
        /// What is missing: "pull" or "resolve".
        capability: &'static str,
    },
    /// The credentials are for another registry.
    #[error("the credentials are for {server:?}, but the image is at {registry:?}")]
    OtherServer {
        /// Whom the credentials are for.
        server: String,
        /// Where the image is.
        registry: String,
    },
    /// No HTTP client can be made.
    #[error("no HTTP client for {endpoint}: {problem}")]
    Client {
        /// Where it was to connect to.
        endpoint: String,
        /// Why.
        problem: String,
    },
}

impl RegistryError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::OtherServer { .. } => ErrorKind::InvalidArgument,
            Self::Read { .. }
            | Self::TooLarge { .. }
            | Self::Syntax { .. }
            | Self::Value { .. }
            | Self::Certificate { .. }
            | Self::Capability { .. }
            | Self::Client { .. } => ErrorKind::FailedPrecondition,
        }
    }
}
