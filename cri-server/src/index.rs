//! What clients are shown: the newest record of each sandbox and container. Lists and status calls read it and nothing else,
//! so none of them waits for a guest. Only drivers write it, after the state is durable.

use std::collections::BTreeMap;
use std::sync::Arc;

use isopod_proto::{ErrorKind, ObjectId};
use parking_lot::RwLock;

use crate::container::ContainerRecord;
use crate::sandbox::SandboxRecord;

/// The records.
#[derive(Default)]
pub struct Index {
    sandboxes: RwLock<BTreeMap<String, Arc<SandboxRecord>>>,
    containers: RwLock<BTreeMap<String, Arc<ContainerRecord>>>,
}

/// An id, or the beginning of one, that stands for nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// Nothing to look for.
    #[error("the {what} id is empty")]
    Empty {
        /// Sandbox or container.
        what: &'static str,
    },
    /// No id begins so.
    #[error("{what} {id:?} does not exist")]
    NotFound {
        /// Sandbox or container.
        what: &'static str,
        /// What was looked for.
        id: String,
    },
    /// Several ids begin so.
    #[error("several {what} ids begin with {id:?}")]
    Ambiguous {
        /// Sandbox or container.
        what: &'static str,
        /// What was looked for.
        id: String,
    },
}

impl LookupError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Empty { .. } | Self::Ambiguous { .. } => ErrorKind::InvalidArgument,
            Self::NotFound { .. } => ErrorKind::NotFound,
        }
    }
}

/// The entry whose key is `id`, or the only one whose key begins with it.
fn lookup<T: Clone>(what: &'static str, entries: &BTreeMap<String, T>, id: &str) -> Result<T, LookupError> {
    if id.is_empty() {
        return Err(LookupError::Empty { what });
    }
    if let Some(entry) = entries.get(id) {
        return Ok(entry.clone());
    }
    let shown: String = id.chars().take(80).collect();
    let mut matches = entries.range(id.to_owned()..).take_while(|(key, _)| key.starts_with(id));
    match (matches.next(), matches.next()) {
        (None, _) => Err(LookupError::NotFound { what, id: shown }),
        (Some((_, entry)), None) => Ok(entry.clone()),
        (Some(_), Some(_)) => Err(LookupError::Ambiguous { what, id: shown }),
    }
}

impl Index {
    /// Shows a sandbox.
    pub fn publish_sandbox(&self, record: &SandboxRecord) {
        self.sandboxes.write().insert(record.id.to_string(), Arc::new(record.clone()));
    }

    /// Shows a container.
    pub fn publish_container(&self, record: &ContainerRecord) {
        self.containers.write().insert(record.id.to_string(), Arc::new(record.clone()));
    }

    /// Shows a sandbox no longer.
    pub fn remove_sandbox(&self, id: &ObjectId) {
        self.sandboxes.write().remove(id.as_str());
    }

    /// Shows a container no longer.
    pub fn remove_container(&self, id: &ObjectId) {
        self.containers.write().remove(id.as_str());
    }

    /// The sandbox whose id is or begins with `id`.
    pub fn sandbox(&self, id: &str) -> Result<Arc<SandboxRecord>, LookupError> {
        lookup("sandbox", &self.sandboxes.read(), id)
    }

    /// The container whose id is or begins with `id`.
    pub fn container(&self, id: &str) -> Result<Arc<ContainerRecord>, LookupError> {
        lookup("container", &self.containers.read(), id)
    }

    /// All sandboxes.
    pub fn sandboxes(&self) -> Vec<Arc<SandboxRecord>> {
        self.sandboxes.read().values().cloned().collect()
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Arc<ContainerRecord>> {
        self.containers.read().values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_stands_for_an_id_only_if_it_is_the_only_one() {
        let entries: BTreeMap<String, u8> = [("aab".to_owned(), 1), ("aac".to_owned(), 2), ("ab".to_owned(), 3)].into();
        let find = |id| lookup("sandbox", &entries, id);
        assert_eq!(find("aab"), Ok(1));
        assert_eq!(find("ab"), Ok(3));
        assert_eq!(find("aac"), Ok(2));
        assert_eq!(find("aa").map_err(|error| error.kind()), Err(ErrorKind::InvalidArgument));
        assert_eq!(find("x").map_err(|error| error.kind()), Err(ErrorKind::NotFound));
        assert_eq!(find("").map_err(|error| error.kind()), Err(ErrorKind::InvalidArgument));
        assert_eq!(find("aabb").map_err(|error| error.kind()), Err(ErrorKind::NotFound));
    }

    #[test]
    fn a_full_id_is_never_ambiguous() {
        let entries: BTreeMap<String, u8> = [("a".to_owned(), 1), ("ab".to_owned(), 2)].into();
        assert_eq!(lookup("sandbox", &entries, "a"), Ok(1));
    }
}
