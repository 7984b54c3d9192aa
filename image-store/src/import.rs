//! Images from an archive: an OCI layout (image-spec, image-layout.md) or what `docker save` writes.
//!
//! The archive is hostile as a registry is: its files are bounded while they are put aside, its documents are read by the parsers
//! that a pull uses, and its layers go through the pipeline that a pull's do, digests and limits included.

pub(crate) mod archive;
pub(crate) mod documents;
mod open;

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use isopod_proto::ErrorKind;

use self::archive::{Archive, Span};
pub use self::open::open_archive;
use crate::digest::{Digest, ImageId};
use crate::layer::{BlobSender, LayerError};
use crate::making::{MakeError, NewImage, NewLayer, make_image};
use crate::manifest::{self, Blob, Document, DocumentError};
use crate::reference::{ImageName, ReferenceError};
use crate::store::{Inner, StoreError};

const CHUNK: usize = 256 << 10;

/// Why an archive cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It cannot be read to its end.
    #[error("the archive cannot be read")]
    Archive {
        /// Why.
        #[source]
        source: LayerError,
    },
    /// It is no image archive, or lacks something, or is malformed.
    #[error("the archive: {problem}")]
    Malformed {
        /// What is wrong.
        problem: String,
    },
    /// It has nothing for linux/amd64.
    #[error("the archive has no image for linux/amd64, but for: {platforms}")]
    Platform {
        /// What there is.
        platforms: String,
    },
    /// Something in it is not supported.
    #[error("the archive is not supported: {problem}")]
    Unsupported {
        /// What.
        problem: String,
    },
    /// An image in it has no name, and none was given.
    #[error("image {image} has no name in the archive; one has to be given")]
    NoName {
        /// Its id, or the digest of its manifest.
        image: Digest,
    },
    /// What it calls an image is no name.
    #[error("an image in the archive has no usable name")]
    Name {
        /// Why.
        #[source]
        source: ReferenceError,
    },
    /// A layer cannot be made.
    #[error("layer {layer} of the archive cannot be made")]
    Layer {
        /// Its digest or its file.
        layer: String,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// The store failed.
    #[error("the images of the archive cannot be stored")]
    Store {
        /// Why.
        #[source]
        source: StoreError,
    },
}

impl ImportError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Archive { source } | Self::Layer { source, .. } => source.kind(),
            Self::Malformed { .. } => ErrorKind::Corrupt,
            Self::Platform { .. } => ErrorKind::NotFound,
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::NoName { .. } => ErrorKind::InvalidArgument,
            Self::Name { source } => source.kind(),
            Self::Store { source } => source.kind(),
        }
    }
}

/// An image that was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Its id.
    pub id: ImageId,
    /// Its names, in full.
    pub names: Vec<String>,
}

/// How far an import is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The archive was read to its end.
    Read {
        /// Images in it.
        images: usize,
        /// Their layers; one that several have counts for each.
        layers: usize,
    },
    /// So many of all layers are there.
    Layers(usize),
    /// An image is there.
    Image(Imported),
}

/// An image as the archive describes it.
struct Found {
    image: NewImage,
    /// The file of each layer.
    files: Vec<Span>,
}

pub(crate) async fn import(
    store: &Arc<Inner>,
    input: impl Read + Send + 'static,
    name: Option<&str>,
    progress: &(impl Fn(Progress) + Sync),
) -> Result<Vec<Imported>, ImportError> {
    let (inner, name) = (store.clone(), name.map(str::to_owned));
    let read = tokio::task::spawn_blocking(move || {
        let failed = |source| ImportError::Archive { source: LayerError::Write { source } };
        let spool = inner.nameless_file().map_err(failed)?;
        let limits = &inner.config.limits;
        let archive = Archive::read(input, spool, limits).map_err(|source| ImportError::Archive { source })?;
        let found = Reader { archive: &archive, inner: &inner, name: name.as_deref() }.images()?;
        Ok((Arc::new(archive), found))
    });
    let died = || ImportError::Archive { source: LayerError::Thread { problem: "died" } };
    let (archive, found) = read.await.map_err(|_| died())??;
    let layers = found.iter().map(|found| found.files.len()).sum();
    progress(Progress::Read { images: found.len(), layers });
    let (done, mut imported) = (AtomicUsize::new(0), Vec::new());
    for Found { image, files } in found {
        let known = Imported { id: image.id.clone(), names: image.names.clone() };
        let places: Vec<(String, Span)> = image.layers.iter().map(|layer| layer.name.clone()).zip(files).collect();
        let feed = |layer: NewLayer, sink: BlobSender| {
            let span = places.iter().find(|(name, _)| *name == layer.name).map(|(_, span)| *span);
            feed(archive.clone(), span, sink)
        };
        let told = || progress(Progress::Layers(done.fetch_add(1, Ordering::Relaxed) + 1));
        make_image(store, image, feed, told).await.map_err(make_error)?;
        progress(Progress::Image(known.clone()));
        imported.push(known);
    }
    Ok(imported)
}

/// Sends a layer's file, from a thread that may wait for the disk.
async fn feed(archive: Arc<Archive>, span: Option<Span>, sink: BlobSender) -> Result<(), std::io::Error> {
    let span = span.ok_or_else(|| std::io::Error::other("it is not in the archive"))?;
    let sent = tokio::task::spawn_blocking(move || {
        let mut position = 0;
        loop {
            let mut buffer = vec![0; CHUNK];
            let length = archive.read_at(span, position, &mut buffer)?;
            buffer.truncate(length);
            position += length as u64;
            // If the other side has failed, its result says why.
            if length == 0 || !sink.send_blocking(Bytes::from(buffer)) {
                return Ok::<_, std::io::Error>(sink);
            }
        }
    });
    sent.await.map_err(std::io::Error::other)??.end().await;
    Ok(())
}

fn make_error(error: MakeError<std::io::Error>) -> ImportError {
    match error {
        MakeError::Source(layer, source) => {
            ImportError::Layer { layer: layer.name, source: LayerError::Input { source } }
        }
        MakeError::Layer(layer, source) => ImportError::Layer { layer: layer.name, source },
        MakeError::Store(source) => ImportError::Store { source },
        MakeError::Died => ImportError::Archive { source: LayerError::Thread { problem: "died" } },
    }
}

/// Finds the images in an archive.
struct Reader<'a> {
    archive: &'a Archive,
    inner: &'a Inner,
    /// The name of an image that has none.
    name: Option<&'a str>,
}

impl Reader<'_> {
    fn images(&self) -> Result<Vec<Found>, ImportError> {
        let malformed = |problem| ImportError::Malformed { problem };
        // Newer `docker save` writes both; a layout says more.
        let found: Vec<Found> = if self.archive.find("oci-layout").is_some() {
            let images = documents::layout(&self.file("index.json")?).map_err(malformed)?;
            images.into_iter().map(|image| self.of_layout(image)).collect::<Result<_, _>>()?
        } else if self.archive.find("manifest.json").is_some() {
            let images = documents::saved(&self.file("manifest.json")?).map_err(malformed)?;
            images.into_iter().map(|image| self.saved(image)).collect::<Result<_, _>>()?
        } else {
            let problem = "has neither oci-layout nor manifest.json, and so is no image archive".to_owned();
            return Err(ImportError::Malformed { problem });
        };
        match found.is_empty() {
            true => Err(ImportError::Platform { platforms: "none".to_owned() }),
            false => Ok(found),
        }
    }

    fn of_layout(&self, image: documents::LayoutImage) -> Result<Found, ImportError> {
        let documents::LayoutImage { digest, name } = image;
        let name = self.name_of(name.as_deref(), &digest)?;
        let mut document = manifest::parse(&self.blob(&digest)?).map_err(document_error)?;
        if let Document::Index(blob) = &document {
            document = manifest::parse(&self.blob(&blob.digest)?).map_err(document_error)?;
        }
        let Document::Manifest { config, layers } = document else {
            return Err(ImportError::Unsupported { problem: "an index within an index".to_owned() });
        };
        let files = layers.iter().map(|Blob { digest, .. }| (path_of(digest), Some(digest.clone())));
        let files = files.map(|(path, digest)| Ok((self.span(&path)?, path, digest))).collect::<Result<_, _>>()?;
        let names = vec![name.with_digest(&digest).to_string(), name.to_string()];
        self.found(config.digest.clone(), &self.blob(&config.digest)?, names, files)
    }

    fn saved(&self, image: documents::SavedImage) -> Result<Found, ImportError> {
        let config = self.file(&image.config)?;
        let id = Digest::of(&config);
        let names = image.repo_tags.iter().map(|tag| self.name_of(Some(tag), &id));
        let mut names: Vec<String> = names.map(|name| name.map(|name| name.to_string())).collect::<Result<_, _>>()?;
        if names.is_empty() {
            names.push(self.name_of(None, &id)?.to_string());
        }
        let files = image.layers.into_iter().map(|path| Ok((self.span(&path)?, path, None)));
        let files = files.collect::<Result<_, _>>()?;
        self.found(id, &config, names, files)
    }

    /// An image with this configuration and these layers: file, name and, if it is known, digest of each.
    fn found(
        &self,
        id: ImageId,
        config: &[u8],
        names: Vec<String>,
        files: Vec<(Span, String, Option<Digest>)>,
    ) -> Result<Found, ImportError> {
        let (diff_ids, config) = manifest::parse_config(config).map_err(document_error)?;
        let limit = self.inner.config.limits.max_layers;
        if files.len() != diff_ids.len() || files.is_empty() || files.len() > limit {
            let (layers, ids) = (files.len(), diff_ids.len());
            let problem =
                format!("image {id} has {layers} layers and {ids} diff ids; as many of both, 1 to {limit}, go");
            return Err(ImportError::Malformed { problem });
        }
        let mut spans = Vec::new();
        let layers = files.into_iter().zip(diff_ids).map(|((span, name, blob), diff_id)| {
            spans.push(span);
            NewLayer { name, blob, size: span.length, diff_id, spooled: false }
        });
        let layers = layers.collect();
        Ok(Found { image: NewImage { id, config, names, layers }, files: spans })
    }

    /// The full name of an image that the archive calls `name`, which may be a tag alone.
    fn name_of(&self, name: Option<&str>, image: &Digest) -> Result<ImageName, ImportError> {
        let full = match (name, self.name) {
            (Some(name), _) if name.contains(['/', ':']) => name.to_owned(),
            // What was given may have a tag of its own.
            (Some(tag), Some(given)) if !given.rsplit('/').next().unwrap_or_default().contains(':') => {
                format!("{given}:{tag}")
            }
            (_, Some(given)) => given.to_owned(),
            (_, None) => return Err(ImportError::NoName { image: image.clone() }),
        };
        ImageName::parse(&full).map_err(|source| ImportError::Name { source })
    }

    fn span(&self, path: &str) -> Result<Span, ImportError> {
        let shown: String = path.chars().take(300).collect();
        self.archive.find(path).ok_or_else(|| ImportError::Malformed { problem: format!("has no file {shown:?}") })
    }

    /// A document.
    fn file(&self, path: &str) -> Result<Vec<u8>, ImportError> {
        let span = self.span(path)?;
        let limit = self.inner.config.limits.max_manifest_bytes;
        if span.length > limit {
            let problem = format!("{path:?} is above the {limit} bytes that a document may have");
            return Err(ImportError::Malformed { problem });
        }
        // Bounded just above.
        let mut bytes = vec![0; span.length as usize];
        let read = self.archive.read_at(span, 0, &mut bytes);
        read.map_err(|source| ImportError::Archive { source: LayerError::Input { source } })?;
        Ok(bytes)
    }

    /// A document that is named by its digest.
    fn blob(&self, digest: &Digest) -> Result<Vec<u8>, ImportError> {
        let bytes = self.file(&path_of(digest))?;
        match Digest::of(&bytes) {
            actual if actual == *digest => Ok(bytes),
            actual => Err(ImportError::Malformed { problem: format!("what it has as {digest} has digest {actual}") }),
        }
    }
}

fn path_of(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn document_error(error: DocumentError) -> ImportError {
    match error {
        DocumentError::Malformed(problem) => ImportError::Malformed { problem },
        DocumentError::Unsupported(problem) => ImportError::Unsupported { problem },
        DocumentError::NoPlatform(platforms) => ImportError::Platform { platforms },
    }
}
