//! Directories and files of the host, to be shared with a pod.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use isopod_proto::ErrorKind;
use rustix::fs::CWD;
use rustix::mount::OpenTreeFlags;

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
    let mountinfo = std::fs::read("/proc/self/mountinfo").map_err(failed("find the mounts of"))?;
    let facts = Facts::of(&path, &mountinfo);
    if source.follow_host && !facts.spreads {
        return Err(HostError::NotShared { path, mount: facts.mount });
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let mounts =
        rustix::mount::open_tree(CWD, &path, flags).map_err(|error| failed("take the mounts of")(error.into()))?;
    let all_readonly = match source.access {
        Access::Writable => false,
        Access::Readonly => !facts.has_mounts_below && !source.follow_host,
        Access::RecursiveReadonly => true,
    };
    Ok(Tree { mounts, all_readonly })
}

/// What the list of mounts says of a path.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    /// Where the mount is attached that the path is on.
    mount: PathBuf,
    /// That mount is shared, or a slave of one that is.
    spreads: bool,
    /// Something is mounted below the path.
    has_mounts_below: bool,
}

impl Facts {
    /// Of `path`, which has no symbolic links in it, in the contents of /proc/self/mountinfo (proc(5)).
    fn of(path: &Path, mountinfo: &[u8]) -> Self {
        let mut facts = Self { mount: PathBuf::from("/"), spreads: false, has_mounts_below: false };
        for line in mountinfo.split(|byte| *byte == b'\n') {
            let mut fields = line.split(|byte| *byte == b' ');
            let Some(mount) = fields.nth(4).map(unescaped) else { continue };
            // After the mount's options, up to a dash.
            let mut optional = fields.skip(1).take_while(|field| *field != b"-");
            if path.starts_with(&mount) {
                // Of two at the same place the later one covers the other.
                if mount.as_os_str().len() >= facts.mount.as_os_str().len() {
                    facts.spreads =
                        optional.any(|field| field.starts_with(b"shared:") || field.starts_with(b"master:"));
                    facts.mount = mount;
                }
            } else if mount.starts_with(path) {
                facts.has_mounts_below = true;
            }
        }
        facts
    }
}

/// A path of mountinfo, in which space, tab, line feed and backslash are written as octal numbers.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, later)) = rest.split_first() {
        let number =
            later.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        let octal = number.map(|digits| digits.iter().fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0')));
        match octal.and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &later[3..];
            }
            None => {
                bytes.push(*first);
                rest = later;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        23 22 0:20 / /srv/a\\040b rw - tmpfs none rw\n\
        24 22 0:21 / /slave rw master:1 propagate_from:2 - tmpfs none rw\n\
        25 22 0:22 / /slave/below rw - tmpfs none rw\n\
        26 22 0:23 / /twice rw shared:3 - tmpfs none rw\n\
        27 22 0:24 / /twice rw - tmpfs shared:9 rw\n\
        rubbish\n\n";

    fn facts(path: &str) -> (PathBuf, bool, bool) {
        let Facts { mount, spreads, has_mounts_below } = Facts::of(Path::new(path), MOUNTS);
        (mount, spreads, has_mounts_below)
    }

    #[test]
    fn a_path_is_on_the_longest_mount_above_it() {
        assert_eq!(facts("/home/x"), ("/".into(), true, false));
        assert_eq!(facts("/srv"), ("/".into(), true, true));
        assert_eq!(facts("/srv/a b/c"), ("/srv/a b".into(), false, false));
        assert_eq!(facts("/slave"), ("/slave".into(), true, true));
        assert_eq!(facts("/slave/below/x"), ("/slave/below".into(), false, false));
        // Not a component.
        assert_eq!(facts("/slavery"), ("/".into(), true, false));
    }

    #[test]
    fn the_upper_of_two_mounts_at_a_place_counts() {
        assert_eq!(facts("/twice"), ("/twice".into(), false, false));
    }

    #[test]
    fn only_octal_numbers_are_unescaped() {
        assert_eq!(unescaped(b"a\\134b\\011c"), PathBuf::from("a\\b\tc"));
        assert_eq!(unescaped(b"a\\9\\77"), PathBuf::from("a\\9\\77"));
        assert_eq!(unescaped(b"\\777"), PathBuf::from("\\777"));
    }
}
