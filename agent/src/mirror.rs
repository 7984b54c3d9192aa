//! Mirrors: small directories of the host that the guest keeps in its memory, so that changes of the host are changes of the
//! guest's own file system, of which inotify tells. The daemon watches the host's directory and sends it anew when it changes.
//!
//! Each mirror is a tmpfs of its own with a bounded size. Containers get a bind mount of its directory `root`; the directory
//! `staging` beside it, where what is new is made before it gets its name, is seen by the agent alone. A container whose
//! privileges let it write in its mount finds that the next update undoes it, and leads nobody astray with links: every name is
//! one component below a directory that is open, and no link is followed.

mod apply;
pub(crate) mod entry;

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use isopod_proto::agent::MirrorEntry;
use isopod_proto::{MAX_MIRROR_BYTES, MAX_MIRROR_ENTRIES};
use parking_lot::Mutex;
use prost::Message as _;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::error::{Context as _, Error, Result};
use crate::layout::{Layout, check_name};

/// Inodes for an old and a new state together, and for the directories around them.
const INODES: usize = 2 * MAX_MIRROR_ENTRIES + 16;
/// Bytes for an old and a new state together, when every file of both leaves most of its last page unused.
const BYTES: usize = 2 * (MAX_MIRROR_BYTES + MAX_MIRROR_ENTRIES * 4096);

/// The pod's mirrors.
pub struct Mirrors {
    layout: Layout,
    /// By name. What was removed stays as an empty place, so that there is one lock a name; a pod has few names.
    places: Mutex<HashMap<String, Arc<Mutex<Option<Mirror>>>>>,
}

struct Mirror {
    root: OwnedFd,
    staging: OwnedFd,
    /// When the daemon read what it shows.
    read_at: u64,
}

/// What a mirror is to show.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// Its name.
    pub name: String,
    /// To be made if it is not there.
    pub create: bool,
    /// When the daemon read it: what is older than what is shown is ignored.
    pub read_at: u64,
    /// An encoded [`MirrorEntry`].
    pub content: Vec<u8>,
}

impl Mirrors {
    /// None yet.
    pub fn new(layout: Layout) -> Self {
        Self { layout, places: Mutex::default() }
    }

    /// Makes a mirror show what the update says. Blocks.
    pub fn set(&self, update: &Update) -> Result<()> {
        let Update { name, create, read_at, content } = update;
        let path = path(&self.layout, name)?;
        let wanted = MirrorEntry::decode(content.as_slice())
            .map_err(|error| Error::invalid(format!("the content of the mirror {name} is malformed: {error}")))?;
        let wanted = entry::Tree::check(wanted)?;
        let place = Arc::clone(self.places.lock().entry(name.clone()).or_default());
        // Only work in memory is done with the lock; it orders the updates of one mirror.
        let mut place = place.lock();
        let mirror = match &mut *place {
            Some(mirror) => mirror,
            None if *create => place.insert(Mirror::mount(self.layout.mirror(name))?),
            None => return Err(Error::not_found(format!("there is no mirror {name}"))),
        };
        if *read_at < mirror.read_at {
            return Ok(());
        }
        mirror.read_at = *read_at;
        apply::apply(mirror.root.as_fd(), mirror.staging.as_fd(), &wanted)
            .map_err(|error| error.within(format!("bring {path} up to date")))
    }

    /// Removes the mirror `name`; one that is not there is removed already. Blocks.
    pub fn remove(&self, name: &str) -> Result<()> {
        path(&self.layout, name)?;
        let Some(place) = self.places.lock().get(name).map(Arc::clone) else { return Ok(()) };
        let mut place = place.lock();
        let Some(mirror) = place.take() else { return Ok(()) };
        // Process namespaces made meanwhile may still hold the mount. They shall hold nothing else.
        let emptied = apply::empty(mirror.root.as_fd()).and_then(|()| apply::empty(mirror.staging.as_fd()));
        drop(mirror);
        let path = self.layout.mirror(name);
        let text = || format!("unmount the mirror at {}", path.display());
        rustix::mount::unmount(&path, UnmountFlags::DETACH).context(text)?;
        fs::remove_dir(&path).context(text)?;
        emptied
    }
}

impl Mirror {
    fn mount(place: std::path::PathBuf) -> Result<Self> {
        let text = || format!("mount a mirror at {}", place.display());
        fs::create_dir_all(&place).context(text)?;
        let options = format!("mode=0700,size={BYTES},nr_inodes={INODES}");
        let options = std::ffi::CString::new(options).expect("numbers have no NUL");
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        rustix::mount::mount("mirror", &place, "tmpfs", flags, options.as_c_str()).context(text)?;
        let open = |name: &str| {
            let path = place.join(name);
            fs::create_dir(&path).context(text)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(&path, flags, Mode::empty()).context(text)
        };
        open("root").and_then(|root| Ok(Self { root, staging: open("staging")?, read_at: 0 })).inspect_err(|_| {
            // The error that is told is the first one.
            let _ = rustix::mount::unmount(&place, UnmountFlags::DETACH);
        })
    }
}

/// The path of what the mirror `name` shows.
pub fn path(layout: &Layout, name: &str) -> Result<String> {
    check_name("mirror", name)?;
    let path = layout.mirror(name).join("root");
    path.into_os_string().into_string().map_err(|_| Error::invalid("a mirror's path is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_named_plainly() {
        let layout = Layout::guest();
        assert_eq!(path(&layout, "0af").unwrap(), "/run/isopod/mirrors/0af/root");
        for bad in ["", "..", ".x", "a/b", "a\0", &"a".repeat(65)] {
            assert!(path(&layout, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn content_that_is_no_entry_is_refused_before_anything_is_made() {
        let mirrors = Mirrors::new(Layout::new("/nonexistent", "/nonexistent"));
        let error = mirrors.set(&Update { name: "a".into(), content: vec![0xff; 9], ..Update::default() }).unwrap_err();
        assert_eq!(error.kind(), isopod_proto::ErrorKind::InvalidArgument);
        assert!(mirrors.remove("a").is_ok());
    }
}
