//! Taking one of the kubelet's volumes as it is at one moment.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use isopod_proto::agent::{MirrorDirectory, MirrorEntry, mirror_entry};
use isopod_proto::{MAX_MIRROR_BYTES, MAX_MIRROR_DEPTH, MAX_MIRROR_ENTRIES};
use prost::Message as _;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use sha2::{Digest as _, Sha256};

/// How often it is tried while the kubelet changes the volume, and the pause in between.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(25);

/// A volume, taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// An encoded [`MirrorEntry`]; equal for equal volumes.
    pub content: Vec<u8>,
    /// Of the content.
    pub digest: [u8; 32],
    /// When it was begun to be read: CLOCK_BOOTTIME in nanoseconds.
    pub read_at: u64,
}

/// A volume that cannot be mirrored.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not there, or not a directory.
    #[error("there is no directory {0}")]
    Gone(PathBuf),
    /// It does not hold still.
    #[error("{0} changes all the time")]
    Changing(PathBuf),
    /// It is beyond a bound of mirrors.
    #[error("{path} has more than {bound}")]
    TooLarge {
        /// Which volume.
        path: PathBuf,
        /// The bound.
        bound: String,
    },
    /// It has something that mirrors do not know.
    #[error("{path} has {name:?} in it, which is no directory, file or symbolic link of its file system")]
    Unknown {
        /// Which volume.
        path: PathBuf,
        /// What.
        name: String,
    },
    /// A file system call failed.
    #[error("cannot read {path}")]
    Read {
        /// Which volume.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Why an attempt failed.
enum Failure {
    /// Something changed meanwhile.
    Changed,
    TooLarge(String),
    Unknown(Vec<u8>),
    Call(Errno),
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        match error {
            // What was listed a moment ago is gone or has become something else.
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE | Errno::AGAIN => Self::Changed,
            error => Self::Call(error),
        }
    }
}

/// Takes the volume at `path`. `seen` is given every directory of it before it is read, to watch it. Blocks, half a second at
/// most if the volume keeps changing.
pub fn read(path: &Path, seen: &dyn Fn(BorrowedFd<'_>)) -> Result<Snapshot, ReadError> {
    let path_buf = || path.to_path_buf();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(PAUSE);
        }
        let now = clock_gettime(ClockId::Boottime);
        let read_at = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let root = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
            Ok(root) => root,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Err(ReadError::Gone(path_buf())),
            Err(error) => return Err(ReadError::Read { path: path_buf(), source: error.into() }),
        };
        match read_root(&root, seen) {
            Ok(entry) => {
                let content = entry.encode_to_vec();
                let digest = Sha256::digest(&content).into();
                return Ok(Snapshot { content, digest, read_at });
            }
            Err(Failure::Changed) => {}
            Err(Failure::TooLarge(bound)) => return Err(ReadError::TooLarge { path: path_buf(), bound }),
            Err(Failure::Unknown(name)) => {
                let name = String::from_utf8_lossy(&name).into_owned();
                return Err(ReadError::Unknown { path: path_buf(), name });
            }
            Err(Failure::Call(error)) => return Err(ReadError::Read { path: path_buf(), source: error.into() }),
        }
    }
    Err(ReadError::Changing(path_buf()))
}

/// The links of the root are read first: what `..data` leads to is complete by then. If they and the root's names are the same
/// in the end, all that was read between belongs together.
fn read_root(root: &OwnedFd, seen: &dyn Fn(BorrowedFd<'_>)) -> Result<MirrorEntry, Failure> {
    seen(root.as_fd());
    let mut left = Left { bytes: MAX_MIRROR_BYTES, entries: MAX_MIRROR_ENTRIES, seen };
    let before = links(root.as_fd())?;
    let entry = left.directory(root.as_fd(), Vec::new(), 0)?;
    let after = links(root.as_fd())?;
    let kept = before == after && names(&entry).eq(after.iter().map(|(name, _)| name));
    if kept { Ok(entry) } else { Err(Failure::Changed) }
}

fn names(entry: &MirrorEntry) -> impl Iterator<Item = &Vec<u8>> {
    let entries = match &entry.kind {
        Some(mirror_entry::Kind::Directory(directory)) => directory.entries.as_slice(),
        _ => &[],
    };
    entries.iter().map(|entry| &entry.name)
}

/// A name in a directory, and its target if it is a symbolic link.
type Link = (Vec<u8>, Option<Vec<u8>>);

/// The names in a directory, sorted.
fn links(directory: BorrowedFd<'_>) -> Result<Vec<Link>, Failure> {
    let link = |name: Vec<u8>| match rustix::fs::readlinkat(directory, name.as_slice(), Vec::new()) {
        Ok(target) => Ok((name, Some(target.into_bytes()))),
        Err(Errno::INVAL) => Ok((name, None)),
        Err(error) => Err(error.into()),
    };
    list(directory, MAX_MIRROR_ENTRIES)?.into_iter().map(link).collect()
}

/// The names in a directory, sorted.
fn list(directory: BorrowedFd<'_>, most: usize) -> Result<Vec<Vec<u8>>, Failure> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if names.len() == most {
            return Err(Failure::TooLarge(format!("{MAX_MIRROR_ENTRIES} entries")));
        }
        names.push(name.to_vec());
    }
    names.sort();
    Ok(names)
}

/// What may still come.
struct Left<'a> {
    bytes: usize,
    entries: usize,
    seen: &'a dyn Fn(BorrowedFd<'_>),
}

impl Left<'_> {
    fn take(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let left = self.bytes.checked_sub(bytes.len());
        self.bytes = left.ok_or_else(|| Failure::TooLarge(format!("{MAX_MIRROR_BYTES} bytes")))?;
        Ok(())
    }

    fn directory(&mut self, here: BorrowedFd<'_>, name: Vec<u8>, depth: usize) -> Result<MirrorEntry, Failure> {
        if depth > MAX_MIRROR_DEPTH {
            return Err(Failure::TooLarge(format!("{MAX_MIRROR_DEPTH} directories in one another")));
        }
        let stat = rustix::fs::fstat(here)?;
        let names = list(here, self.entries)?;
        self.entries -= names.len();
        let entries = names.into_iter().map(|name| self.entry(here, name, depth + 1)).collect::<Result<_, _>>()?;
        Ok(entry(name, &stat, mirror_entry::Kind::Directory(MirrorDirectory { entries })))
    }

    fn entry(&mut self, here: BorrowedFd<'_>, name: Vec<u8>, depth: usize) -> Result<MirrorEntry, Failure> {
        self.take(&name)?;
        let stat = rustix::fs::statat(here, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let directory = open(here, &name, OFlags::DIRECTORY)?;
                (self.seen)(directory.as_fd());
                self.directory(directory.as_fd(), name, depth)
            }
            FileType::RegularFile => {
                let file = File::from(open(here, &name, OFlags::NONBLOCK)?);
                // It may be another one by now.
                let stat = rustix::fs::fstat(&file)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(Failure::Changed);
                }
                let mut contents = Vec::new();
                let most = self.bytes as u64 + 1;
                (&file).take(most).read_to_end(&mut contents).map_err(call)?;
                self.take(&contents)?;
                Ok(entry(name, &stat, mirror_entry::Kind::File(contents)))
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(here, name.as_slice(), Vec::new())?.into_bytes();
                self.take(&target)?;
                Ok(entry(name, &stat, mirror_entry::Kind::Symlink(target)))
            }
            _ => Err(Failure::Unknown(name)),
        }
    }
}

fn entry(name: Vec<u8>, stat: &Stat, kind: mirror_entry::Kind) -> MirrorEntry {
    MirrorEntry { name, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, kind: Some(kind) }
}

fn call(error: io::Error) -> Failure {
    Errno::from_io_error(&error).map_or(Failure::Call(Errno::IO), Failure::from)
}

fn open(here: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd, Failure> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    match rustix::fs::openat2(here, name, flags, Mode::empty(), resolve) {
        // Something is mounted there.
        Err(Errno::XDEV) => Err(Failure::Unknown(name.to_vec())),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests;
