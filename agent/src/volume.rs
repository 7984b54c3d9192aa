//! Volumes that live as long as the pod and are its own: each is a file system, on a disk or in memory, which the pod's containers
//! share.
//!
//! Containers get bind mounts of its directory `root`, or of what is below that. They write in it as they like, so that a path in it
//! is only ever walked by [`crate::beneath`], and what was found is held by a descriptor.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;

use isopod_proto::agent::PodVolume;
use parking_lot::Mutex;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::beneath::{self, Make};
use crate::error::{Context as _, Error, Result};
use crate::layout::{Layout, check_name};

/// A volume that is to be there.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// What it is kept on.
    pub storage: Storage,
    /// Permission bits of its root, when that is new.
    pub mode: u32,
    /// User and group of its root, when that is new.
    pub owner: (u32, u32),
}

/// What a volume is kept on.
#[derive(Clone, Debug)]
pub enum Storage {
    /// A block device with an ext4 file system, by its path.
    Disk(String),
    /// A tmpfs of this many bytes.
    Memory(u64),
}

/// The pod's volumes.
pub struct Volumes {
    layout: Layout,
    /// Their roots, by name.
    roots: Mutex<HashMap<String, OwnedFd>>,
}

impl Volumes {
    /// None yet.
    pub fn new(layout: Layout) -> Self {
        Self { layout, roots: Mutex::default() }
    }

    /// Makes a volume, unless it is there. Blocks.
    pub fn make(&self, wanted: &Wanted) -> Result<()> {
        let name = &wanted.name;
        check_name("volume", name)?;
        // Held for as long as a mount takes, so that there is one of each name.
        let mut roots = self.roots.lock();
        if roots.contains_key(name) {
            return Ok(());
        }
        let place = self.layout.volume(name);
        mount(&wanted.storage, &place)?;
        let root = make_root(&place.join("root"), wanted).inspect_err(|_| {
            // The error that is told is the first one.
            let _ = rustix::mount::unmount(&place, UnmountFlags::DETACH);
        })?;
        roots.insert(name.clone(), root);
        Ok(())
    }

    /// Makes what `volume` names a mount at `place`, which is not there yet and is the agent's own; returns that path.
    pub fn bind(&self, volume: &PodVolume, place: &Path) -> Result<String> {
        let PodVolume { name, sub_path } = volume;
        let text = || format!("find {sub_path:?} in the volume {name:?}");
        let found = {
            let roots = self.roots.lock();
            let root = roots.get(name).ok_or_else(|| Error::not_found(format!("there is no volume {name:?}")))?;
            walk(root, sub_path).context(text)?
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&found, "", flags).context(text)?;
        let text = || format!("mount {sub_path:?} of the volume {name:?} at {}", place.display());
        if beneath::file_type(&found).context(text)? == FileType::Directory {
            fs::create_dir(place).context(text)?;
        } else {
            fs::File::create_new(place).context(text)?;
        }
        rustix::mount::move_mount(&tree, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context(text)?;
        place.to_str().map(str::to_owned).ok_or_else(|| Error::invalid("a volume's place is not UTF-8"))
    }
}

fn mount(storage: &Storage, place: &Path) -> Result<()> {
    let text = || format!("mount a volume on {storage:?} at {}", place.display());
    fs::create_dir_all(place).context(text)?;
    match storage {
        // `discard`: what is deleted is to be free on the host as well.
        Storage::Disk(device) => {
            rustix::mount::mount(device.as_str(), place, "ext4", MountFlags::NODEV, c"discard,errors=remount-ro")
        }
        Storage::Memory(bytes) => {
            let options = CString::new(format!("mode=0700,size={bytes}")).expect("a number has no NUL");
            rustix::mount::mount("volume", place, "tmpfs", MountFlags::NODEV, options.as_c_str())
        }
    }
    .context(text)
}

/// Opens the root, which is made if the file system is new.
fn make_root(path: &Path, wanted: &Wanted) -> Result<OwnedFd> {
    let text = || format!("make {}", path.display());
    match fs::create_dir(path) {
        Ok(()) => {
            chown(path, Some(wanted.owner.0), Some(wanted.owner.1)).context(text)?;
            fs::set_permissions(path, fs::Permissions::from_mode(wanted.mode & 0o7777)).context(text)?;
        }
        // Of an earlier VM of the pod.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::io(text(), error)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).context(text)
}

/// Opens `path` below `root`, making the directories that are not there, each with the root's permission bits.
fn walk(root: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let mode = Mode::from_raw_mode(rustix::fs::fstat(root)?.st_mode & 0o777);
    let mut found = beneath::open(root.as_fd(), "", OFlags::PATH)?;
    for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
        let part = path.get(..end).ok_or(Errno::INVAL)?;
        let made = beneath::make(root.as_fd(), part, Make::Directory(mode))?;
        if made.new {
            // Not what the agent's umask has left of it.
            let path = format!("/proc/self/fd/{}", made.descriptor.as_raw_fd());
            let group = rustix::fs::fstat(&made.descriptor)?.st_mode & 0o2000;
            rustix::fs::chmod(path, mode | Mode::from_raw_mode(group))?;
        }
        found = made.descriptor;
    }
    Ok(found)
}
