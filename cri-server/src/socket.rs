//! The CRI socket. Whoever can open it can do what root can, as a pod may have any directory of the host.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// A socket that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something failed.
    #[error("cannot {doing} {path}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something that is no socket has its name.
    #[error("{0} is in the way of the CRI socket")]
    InTheWay(PathBuf),
    /// Its group could not get to it.
    #[error("group {group} cannot reach the CRI socket: {directory} is not open to it (mode {mode:o})")]
    Unreachable {
        /// The group.
        group: u32,
        /// The first directory on the way that it may not enter.
        directory: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

/// Listens at `path`: for root alone (0600), or for the members of `group` too (0660). Needs a runtime.
pub fn listen(path: &Path, group: Option<u32>) -> Result<UnixListener, SocketError> {
    let failed = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| SocketError::File { doing, path, source }
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed("make", parent))?;
    }
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(SocketError::InTheWay(path.to_owned()));
        }
        // Only one daemon can have the database open, so nobody listens there.
        fs::remove_file(path).map_err(failed("remove the old", path))?;
    }
    if let Some(group) = group {
        check_way(path, group)?;
    }
    let listener = UnixListener::bind(path).map_err(failed("listen on", path))?;
    // Closed before the group gets it, and open to it only then.
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed("protect", path))?;
    if let Some(group) = group {
        std::os::unix::fs::chown(path, Some(0), Some(group)).map_err(failed("give the group", path))?;
        fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(failed("open to the group", path))?;
    }
    Ok(listener)
}

/// Every directory on the way to `path` may be entered by `group`, or by anybody.
fn check_way(path: &Path, group: u32) -> Result<(), SocketError> {
    for directory in path.ancestors().skip(1) {
        let metadata = fs::metadata(directory).map_err(|source| SocketError::File {
            doing: "look at",
            path: directory.to_owned(),
            source,
        })?;
        // The group's bits count for its members, also where the others' are wider.
        let bit = if metadata.gid() == group { 0o010 } else { 0o001 };
        if metadata.mode() & bit == 0 {
            let mode = metadata.mode() & 0o7777;
            return Err(SocketError::Unreachable { group, directory: directory.to_owned(), mode });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).expect("it is there").mode() & 0o7777
    }

    /// A directory that only its owner may enter, and one in it that anybody may.
    fn directories() -> (tempfile::TempDir, PathBuf) {
        let outer = tempfile::tempdir().expect("made");
        fs::set_permissions(outer.path(), Permissions::from_mode(0o700)).expect("set");
        let inner = outer.path().join("inner");
        fs::create_dir(&inner).expect("made");
        fs::set_permissions(&inner, Permissions::from_mode(0o755)).expect("set");
        (outer, inner)
    }

    #[tokio::test]
    async fn without_a_group_it_is_its_owners_alone_and_an_old_one_is_replaced() {
        let (_outer, inner) = directories();
        let path = inner.join("new/isopod.sock");
        drop(listen(&path, None).expect("it listens"));
        drop(listen(&path, None).expect("it listens again"));
        assert_eq!(mode(&path), 0o600);
        fs::remove_file(&path).expect("removed");
        fs::write(&path, "").expect("written");
        assert!(matches!(listen(&path, None), Err(SocketError::InTheWay(_))));
    }

    #[tokio::test]
    async fn a_group_that_could_not_reach_it_is_refused() {
        let (outer, inner) = directories();
        let path = inner.join("isopod.sock");
        let refused = listen(&path, Some(4321)).expect_err("the outer directory is 0700");
        assert!(
            matches!(&refused, SocketError::Unreachable { directory, .. } if directory == outer.path()),
            "{refused}"
        );
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn root_a_group_that_can_reach_it_gets_it() {
        let (outer, inner) = directories();
        let path = inner.join("isopod.sock");
        std::os::unix::fs::chown(outer.path(), None, Some(4321)).expect("changed");
        fs::set_permissions(outer.path(), Permissions::from_mode(0o710)).expect("set");
        drop(listen(&path, Some(4321)).expect("it listens"));
        let metadata = fs::symlink_metadata(&path).expect("it is there");
        assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o660, 0, 4321));
    }
}
