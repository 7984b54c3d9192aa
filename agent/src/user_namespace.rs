//! The pod's user namespace: made when the first container asks for it, shared by all that do, kept by a descriptor.

use std::fs;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use isopod_proto::agent::{self, IdMapping};
use tokio::sync::Mutex;

use crate::agent::blocking;
use crate::cgroup::Cgroup;
use crate::error::{Context as _, Error, Result};
use crate::launch;
use crate::layout::Layout;
use crate::reaper::Reaper;
use crate::stub::message::{Descriptor, Launch, Owner, Role};
use crate::users::Identity;

/// Name of the cgroup of the process that makes it, which ends at once; no container id looks like it.
const CGROUP: &str = "user-namespace";
/// Most ranges of ids, the kernel's limit (user_namespaces(7)).
const MAX_MAPPINGS: usize = 340;

/// A user namespace.
#[derive(Debug)]
pub struct UserNamespace {
    /// Keeps it, and enters it.
    pub descriptor: OwnedFd,
    mapping: agent::UserNamespace,
}

impl UserNamespace {
    /// Who a user and a group of it are outside of it.
    ///
    /// # Errors
    /// `InvalidArgument` if they are nobody.
    pub fn owner(&self, uid: u32, gid: u32) -> Result<Owner> {
        let nobody =
            |what: &str, id: u32| Error::invalid(format!("{what} {id} is not mapped in the pod's user namespace"));
        Ok(Owner {
            uid: guest_id(&self.mapping.uids, uid).ok_or_else(|| nobody("user", uid))?,
            gid: guest_id(&self.mapping.gids, gid).ok_or_else(|| nobody("group", gid))?,
        })
    }

    /// Who a process with this identity is outside of it; none of its groups may be nobody.
    pub fn owner_of(&self, identity: &Identity) -> Result<Owner> {
        for gid in &identity.groups {
            self.owner(identity.uid, *gid)?;
        }
        self.owner(identity.uid, identity.gid)
    }
}

/// The guest's id for the id `id` of a container.
pub fn guest_id(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id).filter(|offset| *offset < mapping.length)?;
        mapping.guest_id.checked_add(offset)
    })
}

/// The pod's user namespace, as far as it exists.
pub struct UserNamespaces {
    reaper: Arc<Reaper>,
    layout: Layout,
    /// Held while it is made: those who need it have to wait for it, and nobody else takes this lock.
    made: Mutex<Option<Arc<UserNamespace>>>,
}

impl UserNamespaces {
    /// None yet.
    pub fn new(reaper: Arc<Reaper>, layout: Layout) -> Self {
        Self { reaper, layout, made: Mutex::new(None) }
    }

    /// The one with these ids; makes it if there is none.
    ///
    /// # Errors
    /// `InvalidArgument` for ids that cannot be mapped so, `FailedPrecondition` if the pod's has others.
    pub async fn get(&self, wanted: &agent::UserNamespace) -> Result<Arc<UserNamespace>> {
        let mut made = self.made.lock().await;
        match &*made {
            Some(namespace) if namespace.mapping == *wanted => return Ok(Arc::clone(namespace)),
            Some(_) => return Err(Error::precondition("the pod's user namespace has other ids")),
            None => {}
        }
        let (reaper, layout, mapping) = (Arc::clone(&self.reaper), self.layout.clone(), wanted.clone());
        let namespace = Arc::new(blocking(move || make(&reaper, &layout, mapping)).await?);
        *made = Some(Arc::clone(&namespace));
        Ok(namespace)
    }
}

fn make(reaper: &Arc<Reaper>, layout: &Layout, mapping: agent::UserNamespace) -> Result<UserNamespace> {
    check(&mapping.uids)?;
    check(&mapping.gids)?;
    let cgroup = Cgroup::create(layout.cgroup_parent(), CGROUP)?;
    let result = hold(reaper, layout, &cgroup, &mapping);
    let removed = cgroup.remove();
    let descriptor = result?;
    removed?;
    Ok(UserNamespace { descriptor, mapping })
}

/// Makes the namespace in a process of its own and gives it its ids.
fn hold(reaper: &Arc<Reaper>, layout: &Layout, cgroup: &Cgroup, mapping: &agent::UserNamespace) -> Result<OwnedFd> {
    let directory = cgroup.clone_directory()?;
    let mut launch = Launch {
        role: Role::UserNamespace as i32,
        mount_point: layout.mount_point().to_string_lossy().into_owned(),
        ..Launch::default()
    };
    let prepared = launch::prepare(reaper, &mut launch, &[(Descriptor::Cgroup, &directory)])?;
    let process = format!("/proc/{}", prepared.pid);
    for (file, mappings) in [("uid_map", &mapping.uids), ("gid_map", &mapping.gids)] {
        let text = lines(mappings);
        fs::write(format!("{process}/{file}"), &text)
            .context(|| format!("map the ids {text:?} of a user namespace"))
            .map_err(|error| error.with_kind(isopod_proto::ErrorKind::InvalidArgument))?;
    }
    // Dropping what is prepared ends the process; the namespace stays as long as the descriptor.
    Ok(fs::File::open(format!("{process}/ns/user")).context(|| "open a user namespace")?.into())
}

/// The form of /proc/PID/uid_map.
fn lines(mappings: &[IdMapping]) -> String {
    let line =
        |IdMapping { container_id, guest_id, length }: &IdMapping| format!("{container_id} {guest_id} {length}\n");
    mappings.iter().map(line).collect()
}

/// A user namespace whose files nobody owns would be of no use.
fn check(mappings: &[IdMapping]) -> Result<()> {
    if mappings.len() > MAX_MAPPINGS {
        return Err(Error::invalid(format!("a user namespace cannot have {} ranges of ids", mappings.len())));
    }
    guest_id(mappings, 0).map(drop).ok_or_else(|| Error::invalid("the user namespace has no id 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_a_container_are_found_in_its_ranges() {
        let mapping = |container_id, guest_id, length| IdMapping { container_id, guest_id, length };
        let mappings = [mapping(0, 1000, 5), mapping(10, 5000, 5), mapping(20, u32::MAX, 5)];
        let found: Vec<_> = [0, 4, 5, 9, 12, 15, 21].map(|id| guest_id(&mappings, id)).to_vec();
        assert_eq!(found, [Some(1000), Some(1004), None, None, Some(5002), None, None]);
    }

    #[test]
    fn a_namespace_without_a_root_is_refused() {
        let mapping = |container_id, length| IdMapping { container_id, guest_id: 1000, length };
        assert!(check(&[]).is_err() && check(&[mapping(1, 5)]).is_err() && check(&[mapping(0, 0)]).is_err());
        assert!(check(&vec![mapping(0, 1); 341]).is_err() && check(&[mapping(5, 1), mapping(0, 5)]).is_ok());
        assert_eq!(lines(&[mapping(0, 5), mapping(7, 1)]), "0 1000 5\n7 1000 1\n");
    }
}
