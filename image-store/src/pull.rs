//! Pulling an image: name → manifest → configuration → layers → names in the store.

use isopod_proto::ErrorKind;

use crate::auth::Credentials;
use crate::digest::{Digest, ImageId};
use crate::layer::{BlobSender, LayerError};
use crate::making::{MakeError, NewImage, NewLayer, make_image};
use crate::manifest::{self, Blob, Document, DocumentError};
use crate::reference::{ImageName, ReferenceError, Version};
use crate::registry::{Capability, FetchError, Registry, RegistryError};
use crate::store::{ImageStore, StoreError};

/// Why an image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The name is not one.
    #[error("image cannot be pulled")]
    Reference {
        /// Why.
        #[source]
        source: ReferenceError,
    },
    /// The registry has no such image, or lacks a part of it.
    #[error("{what} of image {reference} does not exist in its registry")]
    NotFound {
        /// What was asked for.
        reference: String,
        /// What is missing.
        what: String,
    },
    /// The image is not made for linux/amd64.
    #[error("image {reference} is not made for linux/amd64, but for: {platforms}")]
    Platform {
        /// What was asked for.
        reference: String,
        /// What there is.
        platforms: String,
    },
    /// The credentials, or having none, are not accepted.
    #[error("image {reference}: not authorized: {problem}")]
    Unauthorized {
        /// What was asked for.
        reference: String,
        /// Who said so.
        problem: String,
    },
    /// The registry could not be reached, or failed, after all retries. The prefix is what the kubelet looks for.
    #[error("RegistryUnavailable: image {reference}: {problem}")]
    Unavailable {
        /// What was asked for.
        reference: String,
        /// What happened.
        problem: String,
    },
    /// No byte came for too long.
    #[error("image {reference}: nothing arrived from its registry for {seconds} s")]
    Stalled {
        /// What was asked for.
        reference: String,
        /// The configured timeout.
        seconds: f64,
    },
    /// A document is too large, or there are too many layers.
    #[error("image {reference}: its {what} is above the {limit} allowed")]
    TooLarge {
        /// What was asked for.
        reference: String,
        /// What is limited.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// The registry answers what makes no sense, or a document is malformed.
    #[error("image {reference}: {problem}")]
    Malformed {
        /// What was asked for.
        reference: String,
        /// What is wrong.
        problem: String,
    },
    /// The image is of a kind that is not supported.
    #[error("image {reference} is not supported: {problem}")]
    Unsupported {
        /// What was asked for.
        reference: String,
        /// What is not supported.
        problem: String,
    },
    /// A document is not what its digest says.
    #[error("image {reference}: its {what} has digest {actual}, not {expected}")]
    Digest {
        /// What was asked for.
        reference: String,
        /// Which document.
        what: &'static str,
        /// The digest it should have.
        expected: Digest,
        /// The digest it has.
        actual: Digest,
    },
    /// A layer cannot be made.
    #[error("image {reference}: layer {layer} cannot be made")]
    Layer {
        /// What was asked for.
        reference: String,
        /// The digest of the layer's blob.
        layer: String,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// The registry cannot be used as it is configured, or with these credentials.
    #[error("image {reference}: its registry cannot be used")]
    Registry {
        /// What was asked for.
        reference: String,
        /// Why.
        #[source]
        source: RegistryError,
    },
    /// The store failed.
    #[error("image {reference} cannot be stored")]
    Store {
        /// What was asked for.
        reference: String,
        /// Why.
        #[source]
        source: StoreError,
    },
}

impl PullError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference { source } => source.kind(),
            Self::NotFound { .. } | Self::Platform { .. } => ErrorKind::NotFound,
            Self::Unauthorized { .. } => ErrorKind::FailedPrecondition,
            Self::Registry { source, .. } => source.kind(),
            Self::Unavailable { .. } => ErrorKind::Unavailable,
            Self::Stalled { .. } => ErrorKind::DeadlineExceeded,
            Self::TooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::Malformed { .. } | Self::Digest { .. } => ErrorKind::Corrupt,
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::Layer { source, .. } => source.kind(),
            Self::Store { source, .. } => source.kind(),
        }
    }
}

pub(crate) async fn pull(store: &ImageStore, reference: &str, credentials: &Credentials) -> Result<ImageId, PullError> {
    let name = ImageName::parse(reference).map_err(|source| PullError::Reference { source })?;
    let config = &store.inner.config;
    let registry = Registry::new(&store.inner.http, &name, credentials, config.pull_progress_timeout)
        .await
        .map_err(|source| PullError::Registry { reference: name.to_string(), source })?;
    Pull { store, name, registry }.run().await
}

struct Pull<'a> {
    store: &'a ImageStore,
    name: ImageName,
    registry: Registry,
}

impl Pull<'_> {
    async fn run(&self) -> Result<ImageId, PullError> {
        let (digest, config, blobs) = self.manifest().await?;
        let id = config.digest.clone();
        let bytes = self.document(&format!("blobs/{}", config.digest), "", "configuration", &config.digest).await?;
        let (diff_ids, config) = manifest::parse_config(&bytes).map_err(|error| self.document_error(error))?;
        if diff_ids.len() != blobs.len() {
            let (layers, ids) = (blobs.len(), diff_ids.len());
            let problem = format!("its manifest has {layers} layers, its configuration {ids} diff ids");
            return Err(PullError::Malformed { reference: self.name.to_string(), problem });
        }
        let mut names = vec![self.name.with_digest(&digest).to_string()];
        if matches!(self.name.version(), Version::Tag(_)) {
            names.push(self.name.to_string());
        }
        let layers = blobs.into_iter().zip(diff_ids).map(|(blob, diff_id)| NewLayer {
            name: blob.digest.to_string(),
            blob: Some(blob.digest),
            size: blob.size,
            diff_id,
            spooled: true,
        });
        let image = NewImage { id: id.clone(), config, names, layers: layers.collect() };
        let feed = |layer: NewLayer, sink: BlobSender| async move {
            self.registry.blob(&layer.name, layer.size, &sink).await?;
            sink.end().await;
            Ok(())
        };
        make_image(&self.store.inner, image, feed, || {}).await.map_err(|error| self.make_error(error))?;
        Ok(id)
    }

    /// The digest the name stands for, and the configuration and layers that are meant for this platform.
    async fn manifest(&self) -> Result<(Digest, Blob, Vec<Blob>), PullError> {
        let (path, expected, capability) = match self.name.version() {
            Version::Tag(tag) => (format!("manifests/{tag}"), None, Capability::Resolve),
            Version::Digest(digest) => (format!("manifests/{digest}"), Some(digest), Capability::Pull),
        };
        let bytes = self.fetch(capability, &path, manifest::ACCEPT, "manifest").await?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = expected {
            self.check("manifest", expected, &digest)?;
        }
        let mut document = manifest::parse(&bytes).map_err(|error| self.document_error(error))?;
        if let Document::Index(blob) = &document {
            let path = format!("manifests/{}", blob.digest);
            let bytes = self.document(&path, manifest::ACCEPT, "manifest", &blob.digest).await?;
            document = manifest::parse(&bytes).map_err(|error| self.document_error(error))?;
        }
        let reference = || self.name.to_string();
        match document {
            Document::Index(_) => {
                Err(PullError::Unsupported { reference: reference(), problem: "an index within an index".into() })
            }
            Document::Manifest { layers, .. } if layers.is_empty() => {
                Err(PullError::Unsupported { reference: reference(), problem: "it has no layers".into() })
            }
            Document::Manifest { layers, .. } if layers.len() > self.store.inner.config.limits.max_layers => {
                let limit = self.store.inner.config.limits.max_layers as u64;
                Err(PullError::TooLarge { reference: reference(), what: "number of layers".into(), limit })
            }
            Document::Manifest { config, layers } => Ok((digest, config, layers)),
        }
    }

    /// A document whose digest is known.
    async fn document(
        &self,
        path: &str,
        accept: &str,
        what: &'static str,
        expected: &Digest,
    ) -> Result<Vec<u8>, PullError> {
        let bytes = self.fetch(Capability::Pull, path, accept, what).await?;
        self.check(what, expected, &Digest::of(&bytes))?;
        Ok(bytes)
    }

    async fn fetch(
        &self,
        capability: Capability,
        path: &str,
        accept: &str,
        what: &'static str,
    ) -> Result<Vec<u8>, PullError> {
        let limit = self.store.inner.config.limits.max_manifest_bytes;
        self.registry.get(capability, path, accept, limit).await.map_err(|error| self.fetch_error(what, error))
    }

    fn check(&self, what: &'static str, expected: &Digest, actual: &Digest) -> Result<(), PullError> {
        if expected == actual {
            return Ok(());
        }
        let (expected, actual) = (expected.clone(), actual.clone());
        Err(PullError::Digest { reference: self.name.to_string(), what, expected, actual })
    }

    fn fetch_error(&self, what: &str, error: FetchError) -> PullError {
        let reference = self.name.to_string();
        let what = what.to_owned();
        match error {
            FetchError::NotFound => PullError::NotFound { reference, what },
            FetchError::Unauthorized(problem) => PullError::Unauthorized { reference, problem },
            FetchError::Unavailable(problem) => PullError::Unavailable { reference, problem },
            FetchError::Stalled => {
                let seconds = self.store.inner.config.pull_progress_timeout.as_secs_f64();
                PullError::Stalled { reference, seconds }
            }
            FetchError::TooLarge(limit) => PullError::TooLarge { reference, what: format!("{what} in bytes"), limit },
            FetchError::Unexpected(problem) => {
                PullError::Malformed { reference, problem: format!("{what}: {problem}") }
            }
        }
    }

    fn make_error(&self, error: MakeError<FetchError>) -> PullError {
        let reference = self.name.to_string();
        match error {
            MakeError::Source(layer, FetchError::TooLarge(size)) => PullError::Malformed {
                reference,
                problem: format!("layer {} is longer than the {size} bytes its manifest says", layer.name),
            },
            MakeError::Source(layer, error) => self.fetch_error(&format!("layer {}", layer.name), error),
            MakeError::Layer(layer, source) => PullError::Layer { reference, layer: layer.name, source },
            MakeError::Store(source) => PullError::Store { reference, source },
            MakeError::Died => {
                let source = LayerError::Thread { problem: "died" };
                PullError::Layer { reference, layer: "of any digest".to_owned(), source }
            }
        }
    }

    fn document_error(&self, error: DocumentError) -> PullError {
        let reference = self.name.to_string();
        match error {
            DocumentError::Malformed(problem) => PullError::Malformed { reference, problem },
            DocumentError::Unsupported(problem) => PullError::Unsupported { reference, problem },
            DocumentError::NoPlatform(platforms) => PullError::Platform { reference, platforms },
        }
    }
}
