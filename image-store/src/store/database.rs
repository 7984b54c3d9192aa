//! The names and metadata of images, in redb.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::contents::Contents;
use crate::digest::{Digest, ImageId};
use crate::durable::open_database;
use crate::image::{ImageConfig, Verity};
use crate::preload::Preload;

/// Image id → [`Record`] as JSON.
const IMAGES: TableDefinition<&str, &[u8]> = TableDefinition::new("images");
/// Full name, with a tag or a digest → image id.
const NAMES: TableDefinition<&str, &str> = TableDefinition::new("names");
/// Path → [`Preload`] as JSON.
const PRELOADS: TableDefinition<&str, &[u8]> = TableDefinition::new("preloads");

/// What is kept of an image, besides its names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Diff ids, bottom first.
    pub layers: Vec<String>,
    pub size: u64,
    pub config: StoredConfig,
    /// What its disk is verified with. Former versions have none.
    #[serde(default)]
    pub verity: Option<StoredVerity>,
}

impl Record {
    fn is_sound(&self) -> bool {
        self.layers.iter().all(|layer| Digest::parse(layer).is_ok())
    }

    /// The diff ids as digests, which all of them are.
    pub(super) fn diff_ids(&self) -> Vec<Digest> {
        self.layers.iter().filter_map(|layer| Digest::parse(layer).ok()).collect()
    }
}

/// [`Verity`] as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct StoredVerity {
    pub root_hash: [u8; 32],
    pub data_blocks: u64,
}

/// [`ImageConfig`] as it is stored.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StoredConfig {
    pub user: String,
    pub env: Vec<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub working_dir: String,
    pub stop_signal: String,
    pub labels: BTreeMap<String, String>,
    pub volumes: BTreeSet<String>,
    pub exposed_ports: BTreeSet<String>,
}

impl From<StoredVerity> for Verity {
    fn from(StoredVerity { root_hash, data_blocks }: StoredVerity) -> Self {
        Self { root_hash, data_blocks }
    }
}

impl From<Verity> for StoredVerity {
    fn from(Verity { root_hash, data_blocks }: Verity) -> Self {
        Self { root_hash, data_blocks }
    }
}

impl From<StoredConfig> for ImageConfig {
    fn from(stored: StoredConfig) -> Self {
        let StoredConfig { user, env, entrypoint, cmd, working_dir, stop_signal, labels, volumes, exposed_ports } =
            stored;
        Self { user, env, entrypoint, cmd, working_dir, stop_signal, labels, volumes, exposed_ports }
    }
}

pub(super) struct ImageDatabase {
    database: Database,
}

impl ImageDatabase {
    pub(super) fn open(path: &Path) -> Result<Self, redb::Error> {
        Self::prepare(open_database(path)?)
    }

    /// Makes the tables that are not there.
    fn prepare(database: Database) -> Result<Self, redb::Error> {
        let transaction = database.begin_write()?;
        transaction.open_table(IMAGES)?;
        transaction.open_table(NAMES)?;
        transaction.open_table(PRELOADS)?;
        transaction.commit()?;
        Ok(Self { database })
    }

    /// Reads everything. A record that makes no sense is passed over: its image counts as not there.
    pub(super) fn read(&self) -> Result<Contents, redb::Error> {
        let transaction = self.database.begin_read()?;
        let mut contents = Contents::default();
        for row in transaction.open_table(IMAGES)?.iter()? {
            let (key, value) = row?;
            match (Digest::parse(key.value()), serde_json::from_slice(value.value())) {
                (Ok(id), Ok(record)) if Record::is_sound(&record) => drop(contents.images.insert(id, record)),
                _ => tracing::warn!(image = key.value(), "the record of an image cannot be read"),
            }
        }
        for row in transaction.open_table(NAMES)?.iter()? {
            let (name, id) = row?;
            if let Ok(id) = Digest::parse(id.value()) {
                contents.names.insert(name.value().to_owned(), id);
            }
        }
        for row in transaction.open_table(PRELOADS)?.iter()? {
            let (path, preload) = row?;
            // One that cannot be read is not known, and its file is imported again.
            if let Ok(preload) = serde_json::from_slice(preload.value()) {
                contents.preloads.insert(path.value().to_owned(), preload);
            }
        }
        Ok(contents)
    }

    /// Remembers what was preloaded from a file.
    pub(super) fn add_preload(&self, path: &str, preload: &Preload) -> Result<(), redb::Error> {
        let bytes = serde_json::to_vec(preload).expect("strings and numbers can be written as JSON");
        let transaction = self.database.begin_write()?;
        transaction.open_table(PRELOADS)?.insert(path, bytes.as_slice())?;
        transaction.commit()?;
        Ok(())
    }

    /// Forgets what was preloaded from files that `keep` does not want.
    pub(super) fn keep_preloads(&self, keep: impl Fn(&str) -> bool) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        transaction.open_table(PRELOADS)?.retain(|path, _| keep(path))?;
        transaction.commit()?;
        Ok(())
    }

    /// Adds an image and its names, which other images lose. Durable when it returns.
    pub(super) fn add(&self, id: &ImageId, record: &Record, names: &[String]) -> Result<(), redb::Error> {
        let bytes = serde_json::to_vec(record).expect("strings and numbers can be written as JSON");
        let transaction = self.database.begin_write()?;
        transaction.open_table(IMAGES)?.insert(id.as_str(), bytes.as_slice())?;
        {
            let mut table = transaction.open_table(NAMES)?;
            for name in names {
                table.insert(name.as_str(), id.as_str())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Removes images and their names. Durable when it returns.
    pub(super) fn remove(&self, ids: &[ImageId]) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut images = transaction.open_table(IMAGES)?;
            for id in ids {
                images.remove(id.as_str())?;
            }
            let mut names = transaction.open_table(NAMES)?;
            names.retain(|_, id| !ids.iter().any(|gone| gone.as_str() == id))?;
        }
        transaction.commit()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
