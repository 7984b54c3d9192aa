//! The content store.
//!
//! ```text
//! ROOT/version          what this layout is
//!      metadata.redb    names and images
//!      layers/HEX.erofs a layer and the hashes of its blocks, by its diff id
//!      images/HEX.erofs metadata of the file system that an image's layers make, by image id
//!      ingest/          compressed bytes of layers whose pull was cut or runs (`spool.rs`)
//!      tmp/             what is being made; emptied at each start
//! ```
//! Names and images in the database, and the pins of running pulls, are the only roots. Whatever is not reached from them is
//! removed when the last pin or image that reached it goes, and at the start.

mod contents;
mod database;
mod disk;
mod error;
mod files;
mod inner;

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::Semaphore;

pub(crate) use self::database::StoredConfig;
use self::database::{ImageDatabase, Record};
pub use self::error::{OpenError, StoreError};
use self::error::{database_error, io_error};
use self::files::{check_version, remove_file};
pub(crate) use self::inner::{Inner, Pin};
use crate::auth::Credentials;
use crate::config::StoreConfig;
use crate::digest::ImageId;
use crate::durable;
use crate::image::{Image, ImageDisk, Usage};
use crate::import::{self, ImportError, Imported, Progress};
use crate::preload::{self, PreloadError, Preloaded};
use crate::pull::{self, PullError};
use crate::registry::HttpClients;
use crate::spool::Spools;

/// Those of a store.
const DIRECTORIES: [&str; 4] = ["layers", "images", "ingest", "tmp"];

/// A store of images in a directory. Clones are the same store.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

impl ImageStore {
    /// Opens the store, making it if it is not there, and removes what an earlier run left half made.
    pub fn open(config: StoreConfig) -> Result<Self, OpenError> {
        let root = config.root.clone();
        let http = HttpClients::new(&config.registries).map_err(|problem| OpenError::Config { problem })?;
        check(&config).map_err(|problem| OpenError::Config { problem })?;
        for directory in [root.clone(), root.join("layers"), root.join("images"), root.join("ingest"), root.join("tmp")]
        {
            durable::make_directory(&directory).map_err(|source| OpenError::Io { path: directory, source })?;
        }
        check_version(&root)?;
        let path = root.join("metadata.redb");
        let database = ImageDatabase::open(&path).map_err(|source| match source {
            redb::Error::DatabaseAlreadyOpen => OpenError::InUse { root: root.clone() },
            source => OpenError::Database { path, source },
        })?;
        let permits = Arc::new(Semaphore::new(config.max_layers_at_once));
        let http = Arc::new(http);
        let spools = Spools::new(root.join("ingest"), config.resume.clone());
        let (pins, making) = Default::default();
        let inner = Inner { config, http, database, pins, making, permits, spools };
        inner.clean().map_err(|source| OpenError::Store { root, source })?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Fetches an image and gives its id. The registry is asked what the name stands for; layers that are here already are
    /// not fetched again. Dropping the future cancels the pull: its threads stop and what was half made is removed.
    pub async fn pull(&self, reference: &str, credentials: impl Into<Credentials>) -> Result<ImageId, PullError> {
        pull::pull(self, reference, &credentials.into()).await
    }

    /// Takes in the images of an archive: a tar, which may be compressed with gzip or zstd, of an OCI layout or as `docker save`
    /// writes it. `name` is for an image without a name in it. It is read to its end first, into a file without a name in the
    /// store. Dropping the future cancels the import; images that were told to `progress` stay.
    pub async fn import(
        &self,
        archive: impl Read + Send + 'static,
        name: Option<&str>,
        progress: impl Fn(Progress) + Sync,
    ) -> Result<Vec<Imported>, ImportError> {
        import::import(&self.inner, archive, name, &progress).await
    }

    /// Imports the images of the archives and OCI layouts in `directory`, one after the other in the order of their names, and tells
    /// of each. What has not changed since it was imported last, and whose images are here, is not read again. Its images are
    /// pinned as long as it is there. Dropping the future stops it.
    pub async fn preload(&self, directory: &Path, told: impl Fn(&Path, Result<Preloaded, PreloadError>) + Sync) {
        preload::preload(self, directory, told).await;
    }

    /// All images, sorted by id.
    pub fn images(&self) -> Result<Vec<Image>, StoreError> {
        let contents = self.inner.read()?;
        Ok(contents.images.keys().map(|id| contents.image(id)).collect())
    }

    /// The image that `reference` stands for: an id with or without `sha256:`, a prefix of one that is unique, or a name
    /// with or without tag or digest. What cannot be any of these is not found either.
    pub fn find(&self, reference: &str) -> Result<Option<Image>, StoreError> {
        let contents = self.inner.read()?;
        Ok(contents.find(reference)?.map(|id| contents.image(&id)))
    }

    /// Removes the image that `reference` stands for (see [`Self::find`]), with all its names, and the layers no other image
    /// has. One that is not there is a success. Disks that are open stay usable.
    pub fn remove(&self, reference: &str) -> Result<(), StoreError> {
        let pins = self.inner.pins.lock();
        let contents = self.inner.read()?;
        let Some(id) = contents.find(reference)? else { return Ok(()) };
        self.inner.database.remove(std::slice::from_ref(&id)).map_err(database_error("written"))?;
        let path = self.inner.disk_path(&id);
        remove_file(&path).map_err(io_error(&path, "removed"))?;
        let layers = contents.images.get(&id).map(Record::diff_ids).unwrap_or_default();
        self.inner.spools.found_room();
        self.inner.collect(&layers, &pins)
    }

    /// What the store takes on its file system.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let root = &self.inner.config.root;
        self.inner.tidy_spools()?;
        let mut usage = Usage { mountpoint: root.clone(), used_bytes: 0, inodes_used: 0, timestamp_nanos: 0 };
        let mut count = |metadata: std::io::Result<fs::Metadata>| {
            // A file that was removed meanwhile takes nothing.
            if let Ok(metadata) = metadata {
                usage.used_bytes += metadata.blocks() * 512;
                usage.inodes_used += 1;
            }
        };
        count(fs::metadata(root));
        let directories = DIRECTORIES.map(|name| root.join(name));
        for directory in std::iter::once(root).chain(&directories) {
            for entry in fs::read_dir(directory).map_err(io_error(directory, "read"))? {
                count(entry.map_err(io_error(directory, "read"))?.metadata());
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        usage.timestamp_nanos = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        Ok(usage)
    }

    /// The disk of an image. Its open files keep it usable although the image may be removed.
    pub fn disk(&self, id: &ImageId) -> Result<ImageDisk, StoreError> {
        let not_found = || StoreError::NotFound { reference: id.to_string() };
        // Removal takes the same lock, so that no file goes between two opens.
        let _pins = self.inner.pins.lock();
        let contents = self.inner.read()?;
        let record = contents.images.get(id).ok_or_else(not_found)?;
        let verity = record.verity.clone().ok_or_else(not_found)?;
        self.inner.open_disk(id, &record.diff_ids(), verity.into())
    }
}

/// What is wrong with the numbers in the configuration.
fn check(config: &StoreConfig) -> Result<(), String> {
    let mut problems = Vec::new();
    if config.max_layers_at_once_per_pull == 0 {
        problems.push("max_layers_at_once_per_pull must be at least 1");
    }
    if !(1..=Semaphore::MAX_PERMITS).contains(&config.max_layers_at_once) {
        problems.push("max_layers_at_once must be at least 1, and no absurd number");
    }
    if config.pull_progress_timeout.is_zero() {
        problems.push("pull_progress_timeout must be above 0");
    }
    if !(1..=127).contains(&config.limits.max_layers) {
        problems.push("max_layers must be 1 to 127");
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(problems.join("; ")),
    }
}
