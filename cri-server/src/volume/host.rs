//! Directories and files of the host, to be shared with a pod.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use isopod_proto::ErrorKind;
use rustix::fs::CWD;
use rustix::mount::OpenTreeFlags;

use super::mountinfo;
use super::plan::{Access, HostSource};

/// A host path that cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file system call failed.
    #[error("cannot {doing} the host path {path}")]
    Path {
        /// What was tried.
        doing: &'static str,
        /// Which path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Nothing spreads from where it is.
    #[error(
        "{path} is on the mount at {mount}, which is neither shared nor a slave: mounts of the host would not show"
    )]
    NotShared {
        /// Which path.
        path: PathBuf,
        /// The mount it is on.
        mount: PathBuf,
    },
}

impl HostError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Path { source, .. } => match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound,
                _ => ErrorKind::FailedPrecondition,
            },
            Self::NotShared { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

/// A tree of the host, taken.
#[derive(Debug)]
pub struct Tree {
    /// A copy of its mounts, attached nowhere.
    pub mounts: OwnedFd,
    /// Nothing in it can be written, now or later: the guest may be told so.
    pub all_readonly: bool,
}

/// Takes the tree at `source`. What is not there is made: a directory, as other runtimes do. Blocks.
pub fn take(source: &HostSource) -> Result<Tree, HostError> {
    let failed = |doing| move |error| HostError::Path { doing, path: source.path.clone(), source: error };
    if !source.path.exists() {
        std::fs::create_dir_all(&source.path).map_err(failed("make"))?;
    }
    let path = source.path.canonicalize().map_err(failed("find"))?;
    let host_mounts = mountinfo::read().map_err(failed("find the mounts of"))?;
    if source.follow_host
        && let Some(mount) = mountinfo::mount_of(&host_mounts, &path).filter(|mount| !mount.spreads)
    {
        return Err(HostError::NotShared { path, mount: mount.place.clone() });
    }
    let has_mounts_below = host_mounts.iter().any(|mount| mount.place != path && mount.place.starts_with(&path));
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let mounts =
        rustix::mount::open_tree(CWD, &path, flags).map_err(|error| failed("take the mounts of")(error.into()))?;
    let all_readonly = match source.access {
        Access::Writable => false,
        Access::Readonly => !has_mounts_below && !source.follow_host,
        Access::RecursiveReadonly => true,
    };
    Ok(Tree { mounts, all_readonly })
}
