//! Making a directory show a tree, in the order in which the kubelet's atomic writer updates its volumes
//! (kubernetes, pkg/volume/util/atomic_writer.go): what is new is made whole before it has a name, `..data` changes by a rename
//! before anything else that is visible, and what is gone is removed last. So a reader through `..data` has the old state or the
//! new one, and inotify tells of the same changes as on a node. What is as it should be is not touched.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Uid};
use rustix::io::Errno;

use super::entry::{Entry, Owner, Tree};
use crate::error::{Context as _, Error, Result};

/// The link through which the kubelet's volumes are read.
const DATA: &[u8] = b"..data";
/// The name of what is being made, in the staging directory. There is one at a time on each level.
const STAGED: &[u8] = b"new";

/// Makes `root` show `wanted` and nothing else. `staging` is a directory of the same file system that nobody else uses.
pub fn apply(root: BorrowedFd<'_>, staging: BorrowedFd<'_>, wanted: &Tree) -> Result<()> {
    // What an update left that failed.
    empty(staging)?;
    update(root, staging, wanted, 0)
}

/// Removes all that is in a directory.
pub fn empty(directory: BorrowedFd<'_>) -> Result<()> {
    list(directory)?.into_iter().try_for_each(|(name, kind)| remove(directory, &name, kind))
}

/// Makes the directory `here` show `wanted`. Nothing of it is seen before it is whole unless `here` itself is seen.
fn update(here: BorrowedFd<'_>, staging: BorrowedFd<'_>, wanted: &Tree, level: u32) -> Result<()> {
    let present: BTreeMap<_, _> = list(here)?.into_iter().collect();
    let mut entries: Vec<_> = wanted.entries.iter().collect();
    entries.sort_by_key(|(name, entry)| rank(name, entry));
    for (name, entry) in entries {
        let text = || format!("make {:?}", String::from_utf8_lossy(name));
        place(&Place { here, staging, name, level }, present.get(name).copied(), entry)
            .map_err(|error| error.within(text()))?;
    }
    let mut gone: Vec<_> = present.into_iter().filter(|(name, _)| !wanted.entries.contains_key(name)).collect();
    // The names that are seen go before what is behind them.
    gone.sort_by_key(|(name, _)| name.starts_with(b".."));
    gone.into_iter().try_for_each(|(name, kind)| remove(here, &name, kind))?;
    own(here, wanted.owner)
}

/// What comes first: what links will lead to, then the link that leads to all of it, then the rest.
fn rank(name: &[u8], entry: &Entry) -> u8 {
    match entry {
        Entry::Directory(_) => 0,
        Entry::File(..) | Entry::Symlink(..) if name == DATA => 1,
        Entry::File(..) | Entry::Symlink(..) => 2,
    }
}

/// A name in a directory, and where to make what will have it.
struct Place<'a> {
    here: BorrowedFd<'a>,
    staging: BorrowedFd<'a>,
    name: &'a [u8],
    /// How many directories are being made around it.
    level: u32,
}

fn place(place: &Place<'_>, present: Option<FileType>, wanted: &Entry) -> Result<()> {
    let Place { here, staging, name, level } = *place;
    match (present, wanted) {
        (Some(FileType::Directory), Entry::Directory(tree)) => {
            let directory = open_directory(here, name).context(|| "open the directory")?;
            return update(directory.as_fd(), staging, tree, level + 1);
        }
        (Some(FileType::RegularFile), Entry::File(owner, contents)) => {
            if let Some(file) = same_file(here, name, contents)? {
                return own(file.as_fd(), *owner);
            }
        }
        (Some(FileType::Symlink), Entry::Symlink(owner, target)) => {
            let found = rustix::fs::readlinkat(here, name, Vec::new()).context(|| "read the link")?;
            if found.as_bytes() == target {
                return own_link(here, name, *owner);
            }
        }
        // It is whole from the first moment, and inotify tells of it as of the kubelet's.
        (None, Entry::Symlink(owner, target)) => {
            rustix::fs::symlinkat(target.as_slice(), here, name).context(|| "make the link")?;
            return own_link(here, name, *owner);
        }
        _ => {}
    }
    let staged = [STAGED, level.to_string().as_bytes()].concat();
    stage(staging, &staged, wanted, level)?;
    let text = || "move it into its place";
    let directories = present == Some(FileType::Directory) || matches!(wanted, Entry::Directory(_));
    if present.is_some() && directories {
        rustix::fs::renameat_with(staging, &staged, here, name, RenameFlags::EXCHANGE).context(text)?;
        let old = kind_at(staging, &staged).context(|| "find what it replaces")?;
        return remove(staging, &staged, old);
    }
    rustix::fs::renameat(staging, &staged, here, name).context(text)
}

/// Makes `wanted` in the staging directory.
fn stage(staging: BorrowedFd<'_>, name: &[u8], wanted: &Entry, level: u32) -> Result<()> {
    match wanted {
        Entry::Directory(tree) => {
            rustix::fs::mkdirat(staging, name, Mode::RWXU).context(|| "make the directory")?;
            let directory = open_directory(staging, name).context(|| "open the directory")?;
            update(directory.as_fd(), staging, tree, level + 1)
        }
        Entry::File(owner, contents) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(staging, name, flags, Mode::RUSR | Mode::WUSR);
            let mut file = File::from(file.context(|| "make the file")?);
            file.write_all(contents).context(|| format!("write {} bytes", contents.len()))?;
            own(file.as_fd(), *owner)
        }
        Entry::Symlink(owner, target) => {
            rustix::fs::symlinkat(target.as_slice(), staging, name).context(|| "make the link")?;
            own_link(staging, name, *owner)
        }
    }
}

/// The file, if it has these contents.
fn same_file(here: BorrowedFd<'_>, name: &[u8], contents: &[u8]) -> Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(here, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        // A container that may write there has made it something else just now.
        Err(Errno::LOOP | Errno::NOENT | Errno::NXIO) => return Ok(None),
        Err(error) => return Err(Error::io("open the file", error)),
    };
    let stat = rustix::fs::fstat(&file).context(|| "stat the file")?;
    let length = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || length != contents.len() as u64 {
        return Ok(None);
    }
    let mut found = Vec::with_capacity(contents.len());
    (&file).take(length).read_to_end(&mut found).context(|| "read the file")?;
    Ok((found == contents).then_some(file))
}

/// Gives what is open its owner and mode, if it has others.
fn own(descriptor: BorrowedFd<'_>, owner: Owner) -> Result<()> {
    let stat = rustix::fs::fstat(descriptor).context(|| "stat it")?;
    let Owner { mode, uid, gid } = owner;
    let foreign = (stat.st_uid, stat.st_gid) != (uid, gid);
    if foreign {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::fchown(descriptor, Some(uid), Some(gid)).context(|| format!("give it to {uid}:{gid}"))?;
    }
    // A change of the owner takes some bits away.
    if foreign || mode_of(&stat) != mode {
        rustix::fs::fchmod(descriptor, Mode::from_raw_mode(mode)).context(|| format!("give it the mode {mode:o}"))?;
    }
    Ok(())
}

fn own_link(here: BorrowedFd<'_>, name: &[u8], owner: Owner) -> Result<()> {
    let Owner { uid, gid, .. } = owner;
    let text = || format!("give the link to {uid}:{gid}");
    let stat = rustix::fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW).context(text)?;
    if (stat.st_uid, stat.st_gid) == (uid, gid) {
        return Ok(());
    }
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    rustix::fs::chownat(here, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).context(text)
}

fn mode_of(stat: &Stat) -> u32 {
    stat.st_mode & 0o7777
}

fn remove(here: BorrowedFd<'_>, name: &[u8], kind: FileType) -> Result<()> {
    let text = || format!("remove {:?}", String::from_utf8_lossy(name));
    if kind == FileType::Directory {
        // The standard library's follows no links, below a directory that is open.
        let path = [format!("/proc/self/fd/{}/", here.as_raw_fd()).as_bytes(), name].concat();
        return std::fs::remove_dir_all(OsStr::from_bytes(&path)).context(text);
    }
    match rustix::fs::unlinkat(here, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        result => result.context(text),
    }
}

fn list(directory: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, FileType)>> {
    let text = || "list the directory";
    let mut found = Vec::new();
    for entry in Dir::read_from(directory).context(text)? {
        let entry = entry.context(text)?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => kind_at(directory, name).context(text)?,
            kind => kind,
        };
        found.push((name.to_vec(), kind));
    }
    Ok(found)
}

fn kind_at(here: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<FileType> {
    let stat = rustix::fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

fn open_directory(here: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(here, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests;
