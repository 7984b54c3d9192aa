//! What clients are shown: the newest record of each sandbox and container. Lists and status calls read it and nothing else,
//! so none of them waits for a guest. Only drivers write it, after the state is durable. What changes here is told to those
//! who wait for events.

use std::collections::BTreeMap;
use std::sync::Arc;

use isopod_proto::{ErrorKind, ObjectId};
use parking_lot::RwLock;

use crate::container::{ContainerRecord, ContainerState};
use crate::events::{Change, Event, Events};
use crate::sandbox::{SandboxPhase, SandboxRecord, now};

/// The records.
#[derive(Default)]
pub struct Index {
    sandboxes: RwLock<BTreeMap<String, Arc<SandboxRecord>>>,
    containers: RwLock<BTreeMap<String, Arc<ContainerRecord>>>,
    events: Events,
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

/// What a container's change of state is. A container of an earlier daemon is not new, but nobody listens when it is shown.
fn container_change(old: Option<&ContainerState>, new: &ContainerState) -> Option<Change> {
    use ContainerState::{Created, Exited, Running};
    match (old, new) {
        (None, _) => Some(Change::Created),
        (Some(Created | Exited(_)), Running { .. }) => Some(Change::Started),
        (Some(Created | Running { .. }), Exited(_)) => Some(Change::Stopped),
        (Some(_), Created) | (Some(Running { .. }), Running { .. }) | (Some(Exited(_)), Exited(_)) => None,
    }
}

/// What a sandbox's change of state is: it is shown only once it runs.
fn sandbox_changes(old: Option<SandboxPhase>, new: SandboxPhase) -> &'static [Change] {
    use SandboxPhase::{NotReady, Ready, Starting};
    match (old, new) {
        (None | Some(Starting), Ready) => &[Change::Created, Change::Started],
        (Some(Starting | Ready), NotReady) => &[Change::Stopped],
        (None, Starting | NotReady) => &[Change::Created],
        (Some(_), Starting) | (Some(Ready | NotReady), Ready) | (Some(NotReady), NotReady) => &[],
    }
}

impl Index {
    /// Tells of each change of what is shown here.
    pub fn events(&self) -> &Events {
        &self.events
    }

    fn tell(&self, change: Change, subject: &ObjectId, sandbox: &Arc<SandboxRecord>) {
        self.events.publish(|| Event {
            change,
            subject: subject.to_string(),
            at: now(),
            sandbox: Arc::clone(sandbox),
            containers: self.containers_of(&sandbox.id),
        });
    }

    fn tell_of_container(&self, change: Change, container: &ContainerRecord) {
        let sandbox = self.sandboxes.read().get(container.sandbox.as_str()).cloned();
        if let Some(sandbox) = sandbox {
            self.tell(change, &container.id, &sandbox);
        }
    }

    /// Shows a sandbox.
    pub fn publish_sandbox(&self, record: &SandboxRecord) {
        let record = Arc::new(record.clone());
        let old = self.sandboxes.write().insert(record.id.to_string(), Arc::clone(&record));
        for change in sandbox_changes(old.map(|old| old.phase), record.phase) {
            self.tell(*change, &record.id, &record);
        }
    }

    /// Shows a container.
    pub fn publish_container(&self, record: &ContainerRecord) {
        let record = Arc::new(record.clone());
        let old = self.containers.write().insert(record.id.to_string(), Arc::clone(&record));
        if let Some(change) = container_change(old.as_ref().map(|old| &old.state), &record.state) {
            self.tell_of_container(change, &record);
        }
    }

    /// Shows a sandbox no longer.
    pub fn remove_sandbox(&self, id: &ObjectId) {
        let removed = self.sandboxes.write().remove(id.as_str());
        if let Some(record) = removed {
            self.tell(Change::Deleted, id, &record);
        }
    }

    /// Shows a container no longer.
    pub fn remove_container(&self, id: &ObjectId) {
        let removed = self.containers.write().remove(id.as_str());
        if let Some(record) = removed {
            self.tell_of_container(Change::Deleted, &record);
        }
    }

    /// The containers of a sandbox.
    pub fn containers_of(&self, sandbox: &ObjectId) -> Vec<Arc<ContainerRecord>> {
        self.containers.read().values().filter(|container| container.sandbox == *sandbox).cloned().collect()
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

    #[tokio::test]
    async fn the_life_of_a_pod_is_told_step_by_step() {
        use futures_util::StreamExt;

        let index = Index::default();
        let events = index.events().subscribe();
        let mut sandbox = SandboxRecord::for_tests(ObjectId::from_random([1; 32]));
        let mut container = ContainerRecord::for_tests(ObjectId::from_random([2; 32]), sandbox.id.clone());
        index.publish_sandbox(&sandbox);
        index.publish_sandbox(&sandbox); // A change of something else is no event.
        index.publish_container(&container);
        container.state = ContainerState::Running { started_at: 5 };
        index.publish_container(&container);
        index.publish_container(&container);
        container.state = ContainerState::Exited(container.state.ended(3, false, 9));
        index.publish_container(&container);
        sandbox.phase = SandboxPhase::NotReady;
        index.publish_sandbox(&sandbox);
        index.remove_container(&container.id);
        index.remove_container(&container.id);
        index.remove_sandbox(&sandbox.id);
        index.events().close();

        let told: Vec<_> = events.map(|event| event.expect("in time")).collect().await;
        let step = |event: &Event| (event.subject == container.id.as_str(), event.change, event.containers.len());
        let steps: Vec<_> = told.iter().map(step).collect();
        use Change::{Created, Deleted, Started, Stopped};
        let expected = [
            (false, Created, 0),
            (false, Started, 0),
            (true, Created, 1),
            (true, Started, 1),
            (true, Stopped, 1),
            (false, Stopped, 1),
            (true, Deleted, 0),
            (false, Deleted, 0),
        ];
        assert_eq!(steps, expected);
        assert!(matches!(told[4].containers[0].state, ContainerState::Exited(_)));
        assert_eq!(told[5].sandbox.phase, SandboxPhase::NotReady);
    }
}
