//! What the clones of a store share: what keeps a file in it, and what removes it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Semaphore;

use super::contents::Contents;
use super::database::{ImageDatabase, Record, StoredConfig};
use super::disk::NewDisk;
use super::error::{StoreError, database_error, io_error};
use super::files::remove_file;
use crate::config::StoreConfig;
use crate::digest::{Digest, ImageId};
use crate::image::Verity;
use crate::preload::Preload;
use crate::registry::HttpClients;
use crate::spool::{Spools, Use};

pub(crate) struct Inner {
    pub(crate) config: StoreConfig,
    pub(crate) http: Arc<HttpClients>,
    pub(super) database: ImageDatabase,
    /// Layers that running pulls want, with how many want each. Held while anything is removed or made known.
    pub(super) pins: Mutex<HashMap<Digest, usize>>,
    /// One for each layer that is being made, so that it is made once.
    pub(super) making: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    /// A permit for each layer that may be made at the same time, whichever pull wants it.
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) spools: Spools,
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

    pub(super) fn read(&self) -> Result<Contents, StoreError> {
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
    pub(super) fn collect(&self, layers: &[Digest], pins: &HashMap<Digest, usize>) -> Result<(), StoreError> {
        let contents = self.read()?;
        let used = contents.layers();
        for layer in layers.iter().filter(|layer| !used.contains(layer.as_str()) && !pins.contains_key(layer)) {
            let path = self.layer_path(layer);
            remove_file(&path).map_err(io_error(&path, "removed"))?;
        }
        self.tidy_spools()
    }

    /// Removes what cut pulls have left and nobody should go on with.
    pub(super) fn tidy_spools(&self) -> Result<(), StoreError> {
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
    pub(super) fn clean(&self) -> Result<(), StoreError> {
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
