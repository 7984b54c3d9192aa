//! Paths in a directory tree that somebody hostile has made: nothing here leads out of the tree.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, Result};

/// Most symbolic links followed on one path; the kernel's limit.
const MAX_LINKS: usize = 40;

/// Opens `path` as a process whose root is `root` would see it. `flags` gets CLOEXEC.
pub fn open(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        // EAGAIN: something was renamed meanwhile and the kernel cannot vouch for `..`.
        match rustix::fs::openat2(root, relative(path), flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
}

/// What [`make`] makes where a path ends in nothing.
#[derive(Clone, Copy, Debug)]
pub enum Make {
    /// A directory with these permission bits.
    Directory(Mode),
    /// An empty file with these permission bits.
    File(Mode),
}

/// What [`make`] found or made.
#[derive(Debug)]
pub struct Made {
    /// An O_PATH descriptor of it.
    pub descriptor: OwnedFd,
    /// It was not there before.
    pub new: bool,
}

/// Opens `path` beneath `root` (O_PATH), making what is missing of it: directories on the way (0755), and at the end what
/// `last` says. Symbolic links are followed within `root`, also those that point to nothing yet.
pub fn make(root: BorrowedFd<'_>, path: &str, last: Make) -> Result<Made> {
    let mut todo: VecDeque<Vec<u8>> = components(path.as_bytes()).collect();
    // The directories that lead to where we are: `..` takes the last one off, and cannot take more than there are.
    let mut trail: Vec<OwnedFd> = Vec::new();
    let mut links = 0;
    let mut new = false;
    while let Some(name) = todo.pop_front() {
        if name == b".." {
            trail.pop();
            continue;
        }
        let here = trail.last().map_or(root, AsFd::as_fd);
        let what = if todo.is_empty() { last } else { Make::Directory(Mode::from_raw_mode(0o755)) };
        let (next, made) = open_or_make(here, &name, what)?;
        new = made;
        if file_type(&next)? != FileType::Symlink {
            trail.push(next);
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP);
        }
        let target = rustix::fs::readlinkat(&next, c"", Vec::new())?.into_bytes();
        if target.starts_with(b"/") {
            trail.clear();
        }
        for component in components(&target).collect::<Vec<_>>().into_iter().rev() {
            todo.push_front(component);
        }
    }
    let descriptor = match trail.pop() {
        Some(descriptor) => descriptor,
        None => rustix::io::fcntl_dupfd_cloexec(root, 3)?,
    };
    Ok(Made { descriptor, new })
}

/// The type of the file that `descriptor` refers to.
pub fn file_type(descriptor: impl AsFd) -> Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(descriptor)?.st_mode))
}

fn open_or_make(here: BorrowedFd<'_>, name: &[u8], what: Make) -> Result<(OwnedFd, bool)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(here, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => {}
        result => return result.map(|found| (found, false)),
    }
    // If somebody else makes it in between, theirs is as good as ours: the open below decides.
    let made = match what {
        Make::Directory(mode) => rustix::fs::mkdirat(here, name, mode),
        Make::File(mode) => rustix::fs::mknodat(here, name, FileType::RegularFile, mode, 0),
    };
    match made {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    Ok((rustix::fs::openat(here, name, flags, Mode::empty())?, made.is_ok()))
}

fn components(path: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".").map(<[u8]>::to_vec)
}

/// openat2 with RESOLVE_IN_ROOT takes an absolute path as one from the root, but not an empty one.
fn relative(path: &str) -> &str {
    let path = path.trim_start_matches('/');
    if path.is_empty() { "." } else { path }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const DIRECTORY: Make = Make::Directory(Mode::from_raw_mode(0o755));
    const FILE: Make = Make::File(Mode::from_raw_mode(0o644));

    fn tree() -> (tempfile::TempDir, OwnedFd) {
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir(outer.path().join("root")).unwrap();
        let root = fs::File::open(outer.path().join("root")).unwrap();
        (outer, root.into())
    }

    #[test]
    fn missing_directories_are_made() {
        let (outer, root) = tree();
        assert!(make(root.as_fd(), "/a/b/c", DIRECTORY).unwrap().new);
        assert!(!make(root.as_fd(), "/a/./b//c/", DIRECTORY).unwrap().new);
        assert!(make(root.as_fd(), "/a/f", FILE).unwrap().new);
        assert!(outer.path().join("root/a/b/c").is_dir() && outer.path().join("root/a/f").is_file());
    }

    #[test]
    fn links_out_of_the_tree_stay_in_it() {
        let (outer, root) = tree();
        symlink("../../../escape", outer.path().join("root/up")).unwrap();
        symlink("/absolute/target", outer.path().join("root/abs")).unwrap();
        make(root.as_fd(), "/up", DIRECTORY).unwrap();
        make(root.as_fd(), "/abs", FILE).unwrap();
        make(root.as_fd(), "/../../x/../../y", DIRECTORY).unwrap();
        assert!(outer.path().join("root/escape").is_dir() && outer.path().join("root/absolute/target").is_file());
        assert!(outer.path().join("root/y").is_dir());
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_to_itself_is_refused() {
        let (outer, root) = tree();
        symlink("loop", outer.path().join("root/loop")).unwrap();
        assert_eq!(make(root.as_fd(), "/loop/x", DIRECTORY).unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn a_file_on_the_way_is_not_a_directory() {
        let (outer, root) = tree();
        fs::write(outer.path().join("root/file"), "").unwrap();
        assert_eq!(make(root.as_fd(), "/file/x", DIRECTORY).unwrap_err(), Errno::NOTDIR);
    }

    #[test]
    fn open_sees_the_root_as_the_top() {
        let (outer, root) = tree();
        fs::write(outer.path().join("outside"), "").unwrap();
        symlink("../outside", outer.path().join("root/out")).unwrap();
        assert_eq!(open(root.as_fd(), "/out", OFlags::RDONLY).unwrap_err(), Errno::NOENT);
        assert!(open(root.as_fd(), "/", OFlags::PATH).is_ok());
    }
}
