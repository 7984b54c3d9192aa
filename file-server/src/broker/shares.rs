//! The shares: mounts in the root directory that broker and server have in common.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use isopod_proto::ErrorKind;
use isopod_proto::files::AddShare;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::mount::{MoveMountFlags, UnmountFlags};

use crate::sys;

/// Longest name of a share.
const MAX_NAME: usize = 64;

/// A share that cannot be added or taken away.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A request without a request in it.
    #[error("the request is empty or of an unknown kind")]
    Unknown,
    /// Nothing to share.
    #[error("AddShare comes without a tree")]
    NoTree,
    /// Not a name.
    #[error("{0:?} is not the name of a share")]
    Name(String),
    /// There is one of this name.
    #[error("there is a share {0:?} already")]
    Exists(String),
    /// A system call failed.
    #[error("cannot {doing} share {name:?}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// With which share.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl ShareError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unknown | Self::NoTree | Self::Name(_) => ErrorKind::InvalidArgument,
            Self::Exists(_) => ErrorKind::AlreadyExists,
            Self::System { .. } => ErrorKind::Internal,
        }
    }
}

/// The root directory, and the server that serves it.
pub struct Shares {
    root: OwnedFd,
    server: UnixStream,
}

impl Shares {
    /// The root must be made by now.
    pub fn new(server: UnixStream) -> io::Result<Self> {
        let root = rustix::fs::open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { root, server })
    }

    /// Mounts `tree` in the root.
    pub fn add(&self, share: &AddShare, tree: &OwnedFd) -> Result<(), ShareError> {
        let name = checked(&share.name)?;
        let failed = |doing| move |source| ShareError::System { doing, name: name.to_owned(), source };
        restrict(share, tree).map_err(failed("restrict"))?;
        let is_directory = rustix::fs::fstat(tree)
            .map(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
            .map_err(|error| failed("look at")(error.into()))?;
        let made = if is_directory {
            rustix::fs::mkdirat(&self.root, name, Mode::RWXU)
        } else {
            rustix::fs::mknodat(&self.root, name, FileType::RegularFile, Mode::RUSR, 0)
        };
        match made {
            Err(rustix::io::Errno::EXIST) => return Err(ShareError::Exists(name.to_owned())),
            result => result.map_err(|error| failed("make a place for")(error.into()))?,
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(tree, "", &self.root, name, flags).map_err(|error| {
            // The place alone shows nothing of the host.
            let flag = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            let _ = rustix::fs::unlinkat(&self.root, name, flag);
            failed("mount")(error.into())
        })
    }

    /// Takes away the shares whose names begin with `prefix`, and makes the server let go of them.
    pub fn remove(&self, prefix: &str) -> Result<(), ShareError> {
        let prefix = checked(prefix)?;
        let failed = |doing| move |source| ShareError::System { doing, name: format!("{prefix}*"), source };
        for name in self.names().map_err(failed("list"))?.into_iter().filter(|name| name.starts_with(prefix)) {
            let path = format!("/{name}");
            match rustix::mount::unmount(&path, UnmountFlags::DETACH) {
                // Its place was made, but not more.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(failed("unmount")(error.into())),
            }
            let removed = rustix::fs::unlinkat(&self.root, &name, AtFlags::empty())
                .or_else(|_| rustix::fs::unlinkat(&self.root, &name, AtFlags::REMOVEDIR));
            removed.map_err(|error| failed("remove the place of")(error.into()))?;
        }
        let told = (&self.server).write_all(format!("{prefix}\n").as_bytes());
        told.and_then(|()| (&self.server).read_exact(&mut [0])).map_err(failed("let go of"))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = vec![];
        for entry in Dir::read_from(&self.root)? {
            // They were made here: all of them are ASCII.
            names.extend(entry?.file_name().to_str().ok().filter(|name| !name.starts_with('.')).map(str::to_owned));
        }
        Ok(names)
    }
}

fn checked(name: &str) -> Result<&str, ShareError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'.';
    let valid = !name.is_empty() && name.len() <= MAX_NAME && !name.starts_with('.') && name.bytes().all(plain);
    if valid { Ok(name) } else { Err(ShareError::Name(name.chars().take(80).collect())) }
}

/// Sets what the mounts of a tree allow, before it is attached anywhere. Nothing of it is ever executed or opened as a device
/// here; whether the guest may is the guest's concern.
fn restrict(share: &AddShare, tree: &OwnedFd) -> io::Result<()> {
    let harmless = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let recursive = if share.recursive_readonly { harmless | libc::MOUNT_ATTR_RDONLY } else { harmless };
    let propagation = if share.follow_host { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    sys::mount_setattr(tree.as_fd(), recursive, propagation, true)?;
    if share.readonly { sys::mount_setattr(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, false) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        assert!(checked("0123abcd.7").is_ok());
        for bad in ["", ".", "..", ".a", "a/b", "A", "a b", &"x".repeat(65)] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }
}
