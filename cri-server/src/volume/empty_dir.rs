//! The kubelet's emptyDir volumes: not shared, but file systems of the pod's own in the guest, with all that a local file system
//! can do and a virtio-fs share cannot (inotify, locks, sockets, device speed).
//!
//! One that is on the node's disk is a sparse file in the volume's own directory, which is plugged into the VM. So the kubelet, which
//! measures that directory, sees what the pod uses of it (`sizeLimit`, eviction), and removes it with the volume; and what is in
//! it is still there when the kubelet replaces the pod's sandbox. The VMM holds a lock on the file, so that it is never in two VMs.
//!
//! One with `medium: Memory`, for which the kubelet mounts a tmpfs, is a tmpfs of the same size in the guest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use isopod_proto::ErrorKind;
use rustix::fs::{FlockOperation, OFlags};

use super::kubelet::{self, Part};
use super::mountinfo::{self, Mount};
use crate::ext4::{Ext4Error, Kind};

const PLUGIN: &str = "kubernetes.io~empty-dir";
/// The disk in the volume's directory, and what it is called while it is made.
const DISK: &str = ".isopod.ext4";
const NEW_DISK: &str = ".isopod.ext4.new";
/// TMPFS_MAGIC of linux/magic.h.
const TMPFS: i64 = 0x0102_1994;
/// Most directories that are looked through for files.
const MAX_DIRECTORIES: usize = 256;
/// Bytes that a disk's length is a multiple of.
const SECTOR: u64 = 512;

/// An emptyDir volume that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EmptyDirError {
    /// A file system call failed.
    #[error("cannot {doing} {path}")]
    Path {
        /// What was tried.
        doing: &'static str,
        /// With which path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its disk cannot be made.
    #[error("it has no disk")]
    Disk(#[source] Ext4Error),
    /// Another VM has it.
    #[error("{0} is in use by another VM")]
    InUse(PathBuf),
    /// Its disk is larger than the VM may write.
    #[error("{path} has {bytes} bytes; the VM, made with a scratch disk of {limit} bytes, can have no larger one")]
    TooLarge {
        /// The disk.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// What there may be.
        limit: u64,
    },
    /// Something else is where its disk should be.
    #[error("{0} is not a disk")]
    NotADisk(PathBuf),
    /// What the kubelet says is a sub-path of it is not.
    #[error("{0} is not mounted as a part of its volume")]
    SubPath(PathBuf),
}

impl EmptyDirError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Path { .. } | Self::InUse(_) | Self::TooLarge { .. } | Self::SubPath(_) => {
                ErrorKind::FailedPrecondition
            }
            Self::Disk(error) => error.kind(),
            Self::NotADisk(_) => ErrorKind::Corrupt,
        }
    }
}

/// An emptyDir volume, or a part of one.
#[derive(Debug, PartialEq, Eq)]
pub struct EmptyDir {
    /// Its directory on the host.
    pub volume: PathBuf,
    /// What of it; empty: all.
    pub sub_path: String,
}

/// What the volume at `path` of the pod `uid` is, if it is one. Blocks.
pub fn find(path: &Path, uid: &str) -> Result<Option<EmptyDir>, EmptyDirError> {
    let Some(found) = kubelet::parse(path).filter(|found| found.uid == uid) else { return Ok(None) };
    let volume = found.pods.join(uid).join("volumes").join(PLUGIN).join(found.volume);
    match found.part {
        Part::Whole(PLUGIN) => Ok(Some(EmptyDir { volume, sub_path: String::new() })),
        Part::SubPath if volume.is_dir() => {
            let list = "/proc/self/mountinfo";
            let mounts =
                mountinfo::read().map_err(|source| EmptyDirError::Path { doing: "read", path: list.into(), source })?;
            let sub_path = sub_path(&mounts, path, &volume).ok_or_else(|| EmptyDirError::SubPath(path.into()))?;
            Ok(Some(EmptyDir { volume, sub_path }))
        }
        Part::Whole(_) | Part::SubPath => Ok(None),
    }
}

/// What of `volume` is mounted at `path`.
fn sub_path(mounts: &[Mount], path: &Path, volume: &Path) -> Option<String> {
    let part = mountinfo::mount_of(mounts, path).filter(|mount| mount.place == path)?;
    let whole = mountinfo::mount_of(mounts, volume)?;
    let root = whole.root.join(volume.strip_prefix(&whole.place).ok()?);
    let below = part.root.strip_prefix(root).ok().filter(|_| part.device == whole.device)?;
    below.to_str().map(str::to_owned)
}

/// What a volume is in the guest.
#[derive(Debug)]
pub struct Shape {
    /// A tmpfs of this many bytes; none: on a disk.
    pub memory: Option<u64>,
    /// Permission bits of its root.
    pub mode: u32,
    /// User and group of its root.
    pub owner: (u32, u32),
}

/// What the kubelet has made at `volume`; nothing if that is to be shared, as it holds files of somebody else. Blocks.
pub fn look(volume: &Path) -> Result<Option<Shape>, EmptyDirError> {
    let failed = |source| EmptyDirError::Path { doing: "look at", path: volume.into(), source };
    let metadata = match fs::symlink_metadata(volume) {
        Ok(metadata) if metadata.is_dir() => metadata,
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if !volume.join(DISK).exists() && has_files(volume).map_err(failed)? {
        return Ok(None);
    }
    let above = volume.parent().map(fs::metadata).transpose().map_err(failed)?;
    let is_mount = above.is_none_or(|above| above.dev() != metadata.dev());
    let system = rustix::fs::statfs(volume).map_err(|error| failed(error.into()))?;
    let memory = match is_mount {
        true if system.f_type == TMPFS => Some(system.f_blocks.saturating_mul(system.f_bsize.unsigned_abs())),
        // Such as huge pages.
        true => return Ok(None),
        false => None,
    };
    Ok(Some(Shape { memory, mode: metadata.mode() & 0o7777, owner: (metadata.uid(), metadata.gid()) }))
}

/// Whether there is something else than directories, which the kubelet makes for sub-paths.
fn has_files(directory: &Path) -> io::Result<bool> {
    let mut todo = vec![directory.to_owned()];
    let mut seen = 0;
    while let Some(directory) = todo.pop() {
        seen += 1;
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() && seen + todo.len() < MAX_DIRECTORIES {
                todo.push(entry.path());
            } else if entry.file_name() != NEW_DISK {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Opens the volume's disk, locked for the VM that gets it, and says how many bytes it has, at most those of `kind`. One that is not
/// there is made, of `kind` from the templates in `templates`. Blocks.
pub fn disk(volume: &Path, templates: &Path, kind: Kind) -> Result<(File, u64), EmptyDirError> {
    let path = volume.join(DISK);
    let failed = |doing| {
        let path = path.clone();
        move |source| EmptyDirError::Path { doing, path, source }
    };
    if fs::symlink_metadata(&path).is_err() {
        let new = volume.join(NEW_DISK);
        // Of a daemon that was killed at it.
        let _ = fs::remove_file(&new);
        kind.make(templates, &new).map_err(EmptyDirError::Disk)?;
        fs::rename(&new, &path).map_err(failed("name"))?;
    }
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).map_err(|_| failed("open")(io::ErrorKind::InvalidInput.into()))?;
    let file = File::options().read(true).write(true).custom_flags(flags).open(&path).map_err(failed("open"))?;
    let metadata = file.metadata().map_err(failed("look at"))?;
    if !metadata.is_file() || metadata.len() == 0 || metadata.len() % SECTOR != 0 {
        return Err(EmptyDirError::NotADisk(path));
    }
    if metadata.len() > kind.bytes {
        return Err(EmptyDirError::TooLarge { path, bytes: metadata.len(), limit: kind.bytes });
    }
    // The lock is of the open file, which the VMM gets. It lasts as long as that.
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok((file, metadata.len())),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(EmptyDirError::InUse(path)),
        Err(error) => Err(failed("lock")(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind { bytes: 16 << 20, journal: true };

    fn volume() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let volume = directory.path().join("pods/uid/volumes/kubernetes.io~empty-dir/cache");
        fs::create_dir_all(&volume).expect("made");
        (directory, volume)
    }

    #[test]
    fn only_the_pods_own_volumes_are_found() {
        let (_directory, volume) = volume();
        let whole = EmptyDir { volume: volume.clone(), sub_path: String::new() };
        assert_eq!(find(&volume, "uid").expect("found"), Some(whole));
        assert_eq!(find(&volume, "other").expect("looked"), None);
        assert_eq!(find(&volume.join("x"), "uid").expect("looked"), None);
        let part =
            |name: &str| volume.ancestors().nth(3).expect("the pod").join("volume-subpaths").join(name).join("c/0");
        assert!(matches!(find(&part("cache"), "uid"), Err(EmptyDirError::SubPath(_))), "it is no mount");
        assert_eq!(find(&part("other"), "uid").expect("looked"), None);
    }

    #[test]
    fn a_sub_path_is_what_is_mounted_of_the_volume() {
        let of = |mounts: &[u8]| {
            let mounts = mountinfo::parse(mounts);
            sub_path(&mounts, Path::new("/k/pods/u/volume-subpaths/v/c/0"), Path::new("/k/pods/u/volumes/e/v"))
        };
        let text = |root: &str, device: &str| {
            let below = format!("2 1 {device} {root} /k/pods/u/volume-subpaths/v/c/0 rw - ext4 x rw\n");
            [b"1 1 8:1 / / rw - ext4 x rw\n1 1 8:2 /lib /k rw - ext4 x rw\n", below.as_bytes()].concat()
        };
        assert_eq!(of(&text("/lib/pods/u/volumes/e/v/a/b\\040c", "8:2")).as_deref(), Some("a/b c"));
        assert_eq!(of(&text("/lib/pods/u/volumes/e/v", "8:2")).as_deref(), Some(""));
        assert_eq!(of(&text("/lib/pods/u/volumes/e/other", "8:2")), None);
        assert_eq!(of(&text("/lib/pods/u/volumes/e/v/a", "8:1")), None);
        assert_eq!(of(b"1 1 8:1 / / rw - ext4 x rw\n"), None);
    }

    #[test]
    fn a_volume_with_files_of_somebody_else_is_shared() {
        let (_directory, volume) = volume();
        fs::create_dir_all(volume.join("sub/path")).expect("made");
        let shape = look(&volume).expect("looked").expect("directories are the kubelet's");
        assert_eq!((shape.memory, shape.mode & 0o700), (None, 0o700));
        fs::write(volume.join("sub/path/file"), "").expect("written");
        assert!(look(&volume).expect("looked").is_none());
        assert!(look(&volume.join("missing")).expect("looked").is_none());
    }

    #[test]
    fn a_disk_is_made_once_and_for_one_vm() {
        let (directory, volume) = volume();
        fs::write(volume.join(NEW_DISK), "half").expect("written");
        assert!(look(&volume).expect("looked").is_some());
        let (first, bytes) = disk(&volume, directory.path(), KIND).expect("made");
        assert_eq!(bytes, KIND.bytes);
        let copy = first.try_clone().expect("as the VMM gets it");
        drop(first);
        assert!(matches!(disk(&volume, directory.path(), KIND), Err(EmptyDirError::InUse(_))));
        drop(copy);
        // Its size stays, whatever the configuration says by then.
        let larger = Kind { bytes: 32 << 20, ..KIND };
        assert_eq!(disk(&volume, directory.path(), larger).expect("opened").1, KIND.bytes);
        let smaller = Kind { bytes: 8 << 20, ..KIND };
        assert!(matches!(disk(&volume, directory.path(), smaller), Err(EmptyDirError::TooLarge { .. })));
        fs::write(volume.join(DISK), "odd").expect("written");
        assert!(matches!(disk(&volume, directory.path(), KIND), Err(EmptyDirError::NotADisk(_))));
    }
}
