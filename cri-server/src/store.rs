//! The state database: sandboxes, containers and addresses. A change is on disk before the call that made it is answered.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use isopod_proto::{ErrorKind, ObjectId};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::container::ContainerRecord;
use crate::sandbox::SandboxRecord;

/// Version of what the tables hold. Records are JSON, so fields can be added without changing it.
const SCHEMA: u64 = 1;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const SANDBOXES: TableDefinition<&str, &[u8]> = TableDefinition::new("sandboxes");
const CONTAINERS: TableDefinition<&str, &[u8]> = TableDefinition::new("containers");
/// Address, as a number, to the sandbox that has it.
const ADDRESSES: TableDefinition<u32, &str> = TableDefinition::new("addresses");

/// The database. Clones are the same one.
#[derive(Clone)]
pub struct Store {
    database: Arc<Database>,
}

/// Everything that was stored.
#[derive(Debug, Default)]
pub struct Stored {
    /// All sandboxes.
    pub sandboxes: Vec<SandboxRecord>,
    /// All containers.
    pub containers: Vec<ContainerRecord>,
}

/// The database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Cannot be opened.
    #[error("cannot open the state database {path}")]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<redb::Error>,
    },
    /// It is from another version of isopod.
    #[error("the state database has schema {found}; this isopod knows schema {SCHEMA} only")]
    Schema {
        /// What it has.
        found: u64,
    },
    /// A read or a write failed.
    #[error("cannot {doing} the state database")]
    Database {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        #[source]
        source: Box<redb::Error>,
    },
    /// No address is left.
    #[error("no address is free in the pods' subnet")]
    NoAddress,
    /// The thread died.
    #[error("the state database's thread panicked")]
    Panicked,
}

impl StateError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoAddress => ErrorKind::ResourceExhausted,
            Self::Schema { .. } => ErrorKind::FailedPrecondition,
            Self::Open { .. } | Self::Database { .. } | Self::Panicked => ErrorKind::Internal,
        }
    }
}

/// A record as it is stored.
fn json(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("records have only string keys")
}

fn failed<E: Into<redb::Error>>(doing: &'static str) -> impl Fn(E) -> StateError {
    move |source| StateError::Database { doing, source: Box::new(source.into()) }
}

impl Store {
    /// Opens the database at `path`, making it if it is not there.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let database = isopod_image_store::open_database(path)
            .map_err(|source| StateError::Open { path: path.into(), source: Box::new(source) })?;
        let store = Self { database: Arc::new(database) };
        let found = store.write_now(|transaction| {
            for table in [SANDBOXES, CONTAINERS] {
                transaction.open_table(table).map_err(failed("make"))?;
            }
            transaction.open_table(ADDRESSES).map_err(failed("make"))?;
            let mut meta = transaction.open_table(META).map_err(failed("make"))?;
            let found = meta.get("schema").map_err(failed("read"))?.map(|value| value.value());
            if found.is_none() {
                meta.insert("schema", SCHEMA).map_err(failed("write"))?;
            }
            Ok(found.unwrap_or(SCHEMA))
        })?;
        if found == SCHEMA { Ok(store) } else { Err(StateError::Schema { found }) }
    }

    /// Everything stored. A record that cannot be read is reported in the log and left out.
    pub fn load(&self) -> Result<Stored, StateError> {
        Ok(Stored { sandboxes: self.table(SANDBOXES)?, containers: self.table(CONTAINERS)? })
    }

    fn table<T: DeserializeOwned>(&self, table: TableDefinition<&str, &[u8]>) -> Result<Vec<T>, StateError> {
        let transaction = self.database.begin_read().map_err(failed("read"))?;
        let rows = transaction.open_table(table).map_err(failed("read"))?;
        let mut records = Vec::new();
        for row in rows.iter().map_err(failed("read"))? {
            let (key, value) = row.map_err(failed("read"))?;
            match serde_json::from_slice(value.value()) {
                Ok(record) => records.push(record),
                Err(error) => tracing::error!(id = key.value(), %error, "a record of the state database is unreadable"),
            }
        }
        Ok(records)
    }

    fn write_now<T>(&self, work: impl FnOnce(&WriteTransaction) -> Result<T, StateError>) -> Result<T, StateError> {
        let transaction = self.database.begin_write().map_err(failed("write"))?;
        let result = work(&transaction)?;
        transaction.commit().map_err(failed("commit to"))?;
        Ok(result)
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&WriteTransaction) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, StateError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || store.write_now(work)).await.map_err(|_| StateError::Panicked)?
    }

    async fn put(
        &self,
        table: TableDefinition<'static, &'static str, &'static [u8]>,
        id: &ObjectId,
        record: &impl Serialize,
    ) -> Result<(), StateError> {
        let id = id.clone();
        let bytes = json(record);
        self.write(move |transaction| {
            let mut rows = transaction.open_table(table).map_err(failed("write"))?;
            rows.insert(id.as_str(), bytes.as_slice()).map_err(failed("write"))?;
            Ok(())
        })
        .await
    }

    /// Stores a sandbox, replacing what was stored under its id.
    pub async fn put_sandbox(&self, record: &SandboxRecord) -> Result<(), StateError> {
        self.put(SANDBOXES, &record.id, record).await
    }

    /// Stores a container, replacing what was stored under its id.
    pub async fn put_container(&self, record: &ContainerRecord) -> Result<(), StateError> {
        self.put(CONTAINERS, &record.id, record).await
    }

    /// Stores a sandbox and containers of it that have ended with it: all of them, or none.
    pub async fn put_end(&self, sandbox: &SandboxRecord, ended: &[ContainerRecord]) -> Result<(), StateError> {
        let (key, bytes) = (sandbox.id.clone(), json(sandbox));
        let containers: Vec<_> = ended.iter().map(|record| (record.id.clone(), json(record))).collect();
        self.write(move |transaction| {
            let mut rows = transaction.open_table(CONTAINERS).map_err(failed("write"))?;
            for (key, bytes) in &containers {
                rows.insert(key.as_str(), bytes.as_slice()).map_err(failed("write"))?;
            }
            let mut rows = transaction.open_table(SANDBOXES).map_err(failed("write"))?;
            rows.insert(key.as_str(), bytes.as_slice()).map_err(failed("write"))?;
            Ok(())
        })
        .await
    }

    /// Forgets a sandbox.
    pub async fn remove_sandbox(&self, id: &ObjectId) -> Result<(), StateError> {
        self.remove(SANDBOXES, id).await
    }

    /// Forgets a container.
    pub async fn remove_container(&self, id: &ObjectId) -> Result<(), StateError> {
        self.remove(CONTAINERS, id).await
    }

    async fn remove(
        &self,
        table: TableDefinition<'static, &'static str, &'static [u8]>,
        id: &ObjectId,
    ) -> Result<(), StateError> {
        let id = id.clone();
        self.write(move |transaction| {
            transaction.open_table(table).map_err(failed("write"))?.remove(id.as_str()).map_err(failed("write"))?;
            Ok(())
        })
        .await
    }

    /// Gives `sandbox` the address it has, or the one after the last that is taken, or the first free one.
    pub async fn allocate_address(
        &self,
        first: Ipv4Addr,
        last: Ipv4Addr,
        sandbox: &ObjectId,
    ) -> Result<Ipv4Addr, StateError> {
        let sandbox = sandbox.clone();
        self.write(move |transaction| {
            let mut rows = transaction.open_table(ADDRESSES).map_err(failed("write"))?;
            let mut taken = Vec::new();
            for row in rows.iter().map_err(failed("read"))? {
                let (address, owner) = row.map_err(failed("read"))?;
                if owner.value() == sandbox.as_str() {
                    return Ok(Ipv4Addr::from_bits(address.value()));
                }
                taken.push(address.value());
            }
            let free = choose_address(&taken, first.to_bits(), last.to_bits()).ok_or(StateError::NoAddress)?;
            rows.insert(free, sandbox.as_str()).map_err(failed("write"))?;
            Ok(Ipv4Addr::from_bits(free))
        })
        .await
    }

    /// Takes back whatever address `sandbox` has.
    pub async fn release_address(&self, sandbox: &ObjectId) -> Result<(), StateError> {
        let sandbox = sandbox.clone();
        self.write(move |transaction| {
            let mut rows = transaction.open_table(ADDRESSES).map_err(failed("write"))?;
            rows.retain(|_, owner| owner != sandbox.as_str()).map_err(failed("write"))?;
            Ok(())
        })
        .await
    }

    /// Takes back the addresses of sandboxes that are not among `known`.
    pub async fn release_orphans(&self, known: Vec<ObjectId>) -> Result<(), StateError> {
        self.write(move |transaction| {
            let mut rows = transaction.open_table(ADDRESSES).map_err(failed("write"))?;
            rows.retain(|_, owner| known.iter().any(|id| id.as_str() == owner)).map_err(failed("write"))?;
            Ok(())
        })
        .await
    }
}

/// An address of `first..=last` that is not in `taken`, which is sorted: the one after the highest taken, so that an
/// address rests before it is used again; else the lowest free one.
fn choose_address(taken: &[u32], first: u32, last: u32) -> Option<u32> {
    let next = taken
        .iter()
        .copied()
        .filter(|address| (first..=last).contains(address))
        .max()
        .map_or(first, |highest| highest.saturating_add(1));
    if next <= last {
        return Some(next);
    }
    (first..=last).find(|address| taken.binary_search(address).is_err())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(byte: u8) -> ObjectId {
        ObjectId::from_random([byte; 32])
    }

    #[tokio::test]
    async fn addresses_survive_a_restart_and_are_given_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.redb");
        let (first, last) = (Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 3));
        {
            let store = Store::open(&path).expect("made");
            assert_eq!(store.allocate_address(first, last, &id(1)).await.expect("free"), first);
        }
        let store = Store::open(&path).expect("opened again");
        assert_eq!(store.allocate_address(first, last, &id(2)).await.expect("free"), last);
        assert_eq!(store.allocate_address(first, last, &id(1)).await.expect("the same"), first);
        assert!(matches!(store.allocate_address(first, last, &id(3)).await, Err(StateError::NoAddress)));
        store.release_address(&id(1)).await.expect("released");
        assert_eq!(store.allocate_address(first, last, &id(3)).await.expect("free again"), first);
    }

    #[tokio::test]
    async fn a_sandbox_ends_together_with_its_containers() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.redb");
        let (sandbox, container) = (SandboxRecord::for_tests(id(7)), ContainerRecord::for_tests(id(9), id(7)));
        {
            let store = Store::open(&path).expect("made");
            store.put_end(&sandbox, std::slice::from_ref(&container)).await.expect("stored");
        }
        let stored = Store::open(&path).expect("opened again").load().expect("loaded");
        assert_eq!((stored.sandboxes, stored.containers), (vec![sandbox], vec![container]));
    }

    #[tokio::test]
    async fn records_are_there_after_a_restart() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.redb");
        let record = SandboxRecord::for_tests(id(7));
        {
            let store = Store::open(&path).expect("made");
            store.put_sandbox(&record).await.expect("stored");
            store.put_sandbox(&SandboxRecord::for_tests(id(8))).await.expect("stored");
            store.remove_sandbox(&id(8)).await.expect("removed");
        }
        let stored = Store::open(&path).expect("opened again").load().expect("loaded");
        assert_eq!(stored.sandboxes, [record]);
    }

    #[test]
    fn a_database_of_another_schema_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.redb");
        let store = Store::open(&path).expect("made");
        store
            .write_now(|transaction| {
                transaction.open_table(META).map_err(failed("write"))?.insert("schema", 99).map_err(failed("write"))?;
                Ok(())
            })
            .expect("written");
        drop(store);
        assert!(matches!(Store::open(&path), Err(StateError::Schema { found: 99 })));
    }

    proptest! {
        #[test]
        fn a_chosen_address_is_free_and_in_range(taken in proptest::collection::btree_set(0u32..40, 0..40), first in 5u32..10, size in 0u32..20) {
            let taken: Vec<u32> = taken.into_iter().collect();
            let last = first + size;
            match choose_address(&taken, first, last) {
                Some(address) => prop_assert!((first..=last).contains(&address) && !taken.contains(&address)),
                None => prop_assert!((first..=last).all(|address| taken.contains(&address))),
            }
        }
    }
}
