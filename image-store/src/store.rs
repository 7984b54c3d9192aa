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

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Semaphore;

use self::contents::Contents;
pub(crate) use self::database::StoredConfig;
use self::database::{ImageDatabase, Record};
use self::disk::NewDisk;
pub use self::error::{OpenError, StoreError};
use self::error::{database_error, io_error};
use self::files::{check_version, remove_file};
use crate::auth::Credentials;
use crate::config::StoreConfig;
use crate::digest::{Digest, ImageId};
use crate::durable;
use crate::image::{Image, ImageDisk, Usage, Verity};
use crate::import::{self, ImportError, Imported, Progress};
use crate::preload::{self, Preload, PreloadError, Preloaded};
use crate::pull::{self, PullError};
use crate::registry::HttpClients;
use crate::spool::{Spools, Use};

/// Those of a store.
const DIRECTORIES: [&str; 4] = ["layers", "images", "ingest", "tmp"];

/// A store of images in a directory. Clones are the same store.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: StoreConfig,
    pub(crate) http: Arc<HttpClients>,
    database: ImageDatabase,
    /// Layers that running pulls want, with how many want each. Held while anything is removed or made known.
    pins: Mutex<HashMap<Digest, usize>>,
    /// One for each layer that is being made, so that it is made once.
    making: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    /// A permit for each layer that may be made at the same time, whichever pull wants it.
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) spools: Spools,
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

/// The layers a pull wants. They stay until it goes, although no image has them yet.
pub(crate) struct Pin {
    store: Arc<Inner>,
    layers: Vec<Digest>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.store.pins.lock();
        for layer in &self.layers {
            if let Some(count) = pins.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(layer);
                }
            }
        }
        if let Err(error) = self.store.collect(&self.layers, &pins) {
            tracing::warn!(%error, "layers that no image has stay until the next start");
        }
    }
}

impl Inner {
    pub(crate) fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.config.root.join("layers").join(format!("{}.erofs", diff_id.hex()))
    }

    pub(crate) fn temporary_path(&self, name: &Digest) -> PathBuf {
        self.config.root.join("tmp").join(name.hex())
    }

    /// A file of the store's file system that has no name and goes when it is closed.
    pub(crate) fn nameless_file(&self) -> std::io::Result<File> {
        let directory = self.config.root.join("tmp");
        let path = directory.join(format!("nameless-{:?}", std::thread::current().id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(file)
    }

    fn read(&self) -> Result<Contents, StoreError> {
        self.database.read().map_err(database_error("read"))
    }

    /// Forgets the preloads of files that are not among `paths`, and gives the others whose images are all here.
    pub(crate) fn keep_preloads(&self, paths: BTreeSet<String>) -> Result<BTreeMap<String, Preload>, StoreError> {
        let mut contents = self.read()?;
        if contents.preloads.keys().any(|path| !paths.contains(path)) {
            let kept = self.database.keep_preloads(|path| paths.contains(path));
            kept.map_err(database_error("written"))?;
        }
        let Contents { images, preloads, .. } = &mut contents;
        preloads.retain(|path, preload| paths.contains(path) && preload.ids().all(|id| images.contains_key(&id)));
        Ok(contents.preloads)
    }

    /// Remembers what was preloaded from a file. Durable when it returns.
    pub(crate) fn preloaded(&self, path: &str, preload: &Preload) -> Result<(), StoreError> {
        self.database.add_preload(path, preload).map_err(database_error("written"))
    }

    /// Keeps `layers` from being removed while the pin lives.
    pub(crate) fn pin(self: &Arc<Self>, layers: &[Digest]) -> Pin {
        let layers: Vec<Digest> = layers.iter().collect::<BTreeSet<_>>().into_iter().cloned().collect();
        let mut pins = self.pins.lock();
        for layer in &layers {
            *pins.entry(layer.clone()).or_default() += 1;
        }
        Pin { store: self.clone(), layers }
    }

    /// The lock to hold while a layer is made.
    pub(crate) fn making(&self, diff_id: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut making = self.making.lock();
        making.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = making.get(diff_id).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        making.insert(diff_id.clone(), Arc::downgrade(&lock));
        lock
    }

    /// Makes an image known whose layers are all here and pinned. Durable when it returns. Not for an asynchronous task.
    pub(crate) fn add(
        &self,
        id: &ImageId,
        layers: &[Digest],
        config: StoredConfig,
        names: &[String],
    ) -> Result<(), StoreError> {
        let lock = self.making(id);
        let _making = lock.blocking_lock();
        let mut pins = self.pins.lock();
        // What an id names is always the same, so an image that is known is right. A new one is made while nobody waits; no
        // other thread can make the same known meanwhile.
        let known = self.known_disk(id)?;
        let new = match known {
            Some(_) => None,
            None => Some(MutexGuard::unlocked(&mut pins, || self.make_disk(id, layers))?),
        };
        let verity = new.as_ref().map(|new| new.verity).or(known).map(Into::into);
        let added = new.map_or(Ok(()), NewDisk::put).and_then(|()| {
            let size = self.size(id, layers)?;
            let layers = layers.iter().map(Digest::to_string).collect();
            let record = Record { layers, size, config, verity };
            self.database.add(id, &record, names).map_err(database_error("written"))
        });
        if added.is_err() && known.is_none() {
            // Whatever fails now is found at the next start.
            let _ = fs::remove_file(self.disk_path(id));
        }
        added
    }

    /// Removes those of `layers` that neither an image nor a pull has.
    fn collect(&self, layers: &[Digest], pins: &HashMap<Digest, usize>) -> Result<(), StoreError> {
        let contents = self.read()?;
        let used = contents.layers();
        for layer in layers.iter().filter(|layer| !used.contains(layer.as_str()) && !pins.contains_key(layer)) {
            let path = self.layer_path(layer);
            remove_file(&path).map_err(io_error(&path, "removed"))?;
        }
        self.tidy_spools()
    }

    /// Removes what cut pulls have left and nobody should go on with.
    fn tidy_spools(&self) -> Result<(), StoreError> {
        let state = |diff_id: &Digest| match self.making.lock().get(diff_id).is_some_and(|lock| lock.strong_count() > 0)
        {
            true => Use::Busy,
            false if self.layer_path(diff_id).is_file() => Use::Done,
            false => Use::Waiting,
        };
        self.spools.tidy(state).map_err(|(path, error)| io_error(&path, "removed")(error))
    }

    /// An error if not all files of an image are here; an image of a former version, which has no hashes, is given what it lacks.
    /// What this version has made is not looked into, and never hashed anew: damage would become what is right.
    fn complete(&self, id: &ImageId, record: &Record) -> Result<(), StoreError> {
        let layers = record.diff_ids();
        if record.verity.is_some() {
            return self.size(id, &layers).map(drop);
        }
        layers.iter().try_for_each(|layer| self.complete_layer(layer))?;
        let new = self.make_disk(id, &layers)?;
        let verity = Some(new.verity.into());
        new.put()?;
        self.database.add(id, &Record { verity, ..record.clone() }, &[]).map_err(database_error("written"))
    }

    /// What the disk of an image that is known is verified with.
    fn known_disk(&self, id: &ImageId) -> Result<Option<Verity>, StoreError> {
        let contents = self.read()?;
        let verity = contents.images.get(id).and_then(|record| record.verity.clone());
        Ok(verity.filter(|_| self.disk_path(id).is_file()).map(Verity::from))
    }

    /// Puts the store in order after an earlier run: no image without its files, no file without its image.
    fn clean(&self) -> Result<(), StoreError> {
        let mut contents = self.read()?;
        let broken =
            contents.images.iter().filter_map(|(id, record)| Some((id.clone(), self.complete(id, record).err()?)));
        let broken: BTreeMap<ImageId, StoreError> = broken.collect();
        for (id, error) in &broken {
            let error: &dyn std::error::Error = error;
            tracing::warn!(image = %id, error, "an image without all its files is forgotten");
            contents.images.remove(id);
        }
        if !broken.is_empty() {
            self.database.remove(&broken.into_keys().collect::<Vec<_>>()).map_err(database_error("written"))?;
        }
        let mut keep: BTreeSet<PathBuf> = contents.images.keys().map(|id| self.disk_path(id)).collect();
        keep.extend(contents.images.values().flat_map(Record::diff_ids).map(|layer| self.layer_path(&layer)));
        for directory in ["layers", "images", "tmp"] {
            let directory = self.config.root.join(directory);
            for entry in fs::read_dir(&directory).map_err(io_error(&directory, "read"))? {
                let path = entry.map_err(io_error(&directory, "read"))?.path();
                if !keep.contains(&path) {
                    remove_file(&path).map_err(io_error(&path, "removed"))?;
                }
            }
        }
        self.tidy_spools()
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
