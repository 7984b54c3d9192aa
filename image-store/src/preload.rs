//! Images of a directory of archives, for nodes without a registry: they are imported when the daemon starts, and pinned.
//!
//! What a file brought is remembered with its size and time of change. It is not read again while these are the same and all of its
//! images are here.

use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::digest::ImageId;
use crate::import::{ImportError, Imported, open_archive};
use crate::store::{ImageStore, StoreError};

/// Why the images of a file are not here.
#[derive(Debug, thiserror::Error)]
pub enum PreloadError {
    /// The file or directory cannot be read.
    #[error("images cannot be preloaded from {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is neither an archive nor a directory with an OCI layout.
    #[error("images cannot be preloaded from {path}: it is neither a file nor an OCI layout's directory")]
    Kind {
        /// Which.
        path: PathBuf,
    },
    /// What is in it cannot be imported.
    #[error("the images in {path} cannot be preloaded")]
    Import {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: ImportError,
    },
    /// What it brought cannot be read or remembered.
    #[error("what was preloaded from {path} is not known")]
    Store {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
}

/// The images of a file, which are here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preloaded {
    /// They were, and the file has not changed.
    Unchanged,
    /// It was imported.
    Imported(Vec<Imported>),
}

/// What was preloaded from a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Preload {
    pub stamp: Stamp,
    /// Ids.
    pub images: Vec<String>,
}

/// What tells a changed file: of a layout's directory that of its index, whose blobs never change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    size: u64,
    /// Of the last change, since 1970.
    nanoseconds: u64,
}

/// Imports what has changed in `directory`, one file after the other in the order of their names, and tells of each.
pub(crate) async fn preload(
    store: &ImageStore,
    directory: &Path,
    told: impl Fn(&Path, Result<Preloaded, PreloadError>) + Sync,
) {
    let found = blocking(store, directory, |store, path| {
        let paths = list(&path).map_err(|source| PreloadError::Read { path: path.clone(), source })?;
        let known = store.inner.keep_preloads(paths.iter().map(|path| key(path)).collect());
        Ok((paths, known.map_err(|source| PreloadError::Store { path, source })?))
    });
    let (paths, known) = match found.await {
        Ok(found) => found,
        Err(error) => return told(directory, Err(error)),
    };
    for path in paths {
        let result = match stamp(&path) {
            Ok(stamp) if known.get(&key(&path)).is_some_and(|preload| preload.stamp == stamp) => {
                Ok(Preloaded::Unchanged)
            }
            Ok(stamp) => import(store, &path, stamp).await,
            Err(error) => Err(error),
        };
        told(&path, result);
    }
}

async fn import(store: &ImageStore, path: &Path, stamp: Stamp) -> Result<Preloaded, PreloadError> {
    let read = |source| PreloadError::Read { path: path.to_owned(), source };
    let (input, _) = open_archive(path).map_err(read)?;
    // A thread reads it; it ends with this future.
    let owner = Arc::new(());
    let input = Owned { input, owner: Arc::downgrade(&owner) };
    let imported = store.import(input, None, |_| {}).await;
    let imported = imported.map_err(|source| PreloadError::Import { path: path.to_owned(), source })?;
    let images = imported.iter().map(|image| image.id.to_string()).collect();
    let remembered = blocking(store, path, |store, path| {
        let remembered = store.inner.preloaded(&key(&path), &Preload { stamp, images });
        remembered.map_err(|source| PreloadError::Store { path, source })
    });
    remembered.await?;
    Ok(Preloaded::Imported(imported))
}

/// Does `work`, which is about `path` and waits for the disk, in a thread of its own.
async fn blocking<T: Send + 'static>(
    store: &ImageStore,
    path: &Path,
    work: impl FnOnce(ImageStore, PathBuf) -> Result<T, PreloadError> + Send + 'static,
) -> Result<T, PreloadError> {
    let (store, owned) = (store.clone(), path.to_owned());
    let done = tokio::task::spawn_blocking(move || work(store, owned)).await;
    done.unwrap_or_else(|error| Err(PreloadError::Read { path: path.to_owned(), source: io::Error::other(error) }))
}

/// What is in the directory, sorted; but for names that begin with a dot, as those of files that are not complete do.
fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

fn key(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn stamp(path: &Path) -> Result<Stamp, PreloadError> {
    let read = |source| PreloadError::Read { path: path.to_owned(), source };
    let kind = || PreloadError::Kind { path: path.to_owned() };
    let metadata = fs::metadata(path).map_err(read)?;
    if metadata.is_file() {
        return Ok(stamp_of(&metadata));
    }
    // Neither pipes nor devices are opened.
    let index = metadata.is_dir().then(|| fs::metadata(path.join("index.json")).ok()).flatten();
    index.filter(Metadata::is_file).map(|index| stamp_of(&index)).ok_or_else(kind)
}

fn stamp_of(metadata: &Metadata) -> Stamp {
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let nanoseconds = modified.and_then(|time| u64::try_from(time.as_nanos()).ok());
    Stamp { size: metadata.len(), nanoseconds: nanoseconds.unwrap_or_default() }
}

impl Preload {
    /// Its images.
    pub(crate) fn ids(&self) -> impl Iterator<Item = ImageId> + '_ {
        self.images.iter().filter_map(|id| ImageId::parse(id).ok())
    }
}

/// Bytes that somebody wants as long as `owner` is there.
struct Owned<R> {
    input: R,
    owner: Weak<()>,
}

impl<R: Read> Read for Owned<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.owner.strong_count() {
            0 => Err(io::Error::other("the import was given up")),
            _ => self.input.read(buffer),
        }
    }
}
