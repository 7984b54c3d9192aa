//! Names of images, in the form Docker made the custom.

use std::fmt;

use isopod_proto::ErrorKind;
use oci_spec::distribution::{ParseError, Reference};

use crate::digest::Digest;

/// Longest reference that is looked at: a name of 255 bytes, a tag of 128, a digest, and room.
const MAX_REFERENCE: usize = 1024;

/// A full image name: registry, repository, and a tag or a digest. `busybox` is `docker.io/library/busybox:latest`; of
/// `name:tag@digest` the digest counts and the tag is dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    registry: String,
    repository: String,
    version: Version,
}

/// Which of a repository's images it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Tag(String),
    Digest(Digest),
}

/// Text that is not the name of an image.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// Too long to be one.
    #[error("an image reference of {length} bytes is longer than the {MAX_REFERENCE} allowed")]
    TooLong {
        /// Its length.
        length: usize,
    },
    /// Not of the form.
    #[error("{reference:?} is not an image reference")]
    Malformed {
        /// What was given.
        reference: String,
        /// Why.
        #[source]
        source: ParseError,
    },
    /// The repository has capital letters.
    #[error("image reference {reference:?} has capital letters in its repository")]
    Uppercase {
        /// What was given.
        reference: String,
    },
    /// The digest is not a SHA-256.
    #[error("image reference {reference:?} has a digest that is not sha256 with 64 lower-case digits")]
    Digest {
        /// What was given.
        reference: String,
    },
}

impl ReferenceError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooLong { .. } | Self::Malformed { .. } | Self::Uppercase { .. } | Self::Digest { .. } => {
                ErrorKind::InvalidArgument
            }
        }
    }
}

impl ImageName {
    /// The full name that `reference` stands for.
    pub fn parse(reference: &str) -> Result<Self, ReferenceError> {
        if reference.len() > MAX_REFERENCE {
            return Err(ReferenceError::TooLong { length: reference.len() });
        }
        let malformed = |source| ReferenceError::Malformed { reference: reference.to_owned(), source };
        let parsed = Reference::try_from(reference).map_err(malformed)?;
        let version = match (parsed.digest(), parsed.tag()) {
            (Some(digest), _) => Version::Digest(
                Digest::parse(digest).map_err(|_| ReferenceError::Digest { reference: reference.to_owned() })?,
            ),
            (None, tag) => Version::Tag(tag.unwrap_or("latest").to_owned()),
        };
        // The parser takes them; no registry does.
        if parsed.repository().bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(ReferenceError::Uppercase { reference: reference.to_owned() });
        }
        Ok(Self { registry: parsed.registry().to_owned(), repository: parsed.repository().to_owned(), version })
    }

    /// The registry's host, with the port if there is one: `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path within the registry: `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub(crate) fn version(&self) -> &Version {
        &self.version
    }

    /// This repository's image with `digest`.
    pub(crate) fn with_digest(&self, digest: &Digest) -> Self {
        Self { version: Version::Digest(digest.clone()), ..self.clone() }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Version::Tag(tag) => write!(f, "{}/{}:{tag}", self.registry, self.repository),
            Version::Digest(digest) => write!(f, "{}/{}@{digest}", self.registry, self.repository),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (short, full) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("user/thing", "docker.io/user/thing:latest".to_owned()),
            ("index.docker.io/library/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("localhost/a", "localhost/a:latest".to_owned()),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c".to_owned()),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9".to_owned()),
            (&format!("busybox@{digest}"), format!("docker.io/library/busybox@{digest}")),
            (&format!("busybox:1@{digest}"), format!("docker.io/library/busybox@{digest}")),
        ] {
            assert_eq!(ImageName::parse(short).unwrap().to_string(), full);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(2000);
        for bad in ["", "UPPER", "a b", "../x", "a:b:c", "x@sha256:00", "http://x/y", "a/../b", &long] {
            assert_eq!(ImageName::parse(bad).unwrap_err().kind(), ErrorKind::InvalidArgument, "{bad}");
        }
    }
}
