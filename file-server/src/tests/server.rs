//! Requests as a guest would send them, and as it should not.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use super::*;
use crate::fuse::{ROOT, opcode, setattr};
use crate::jail::seccomp::Filters;

/// A root with one share, "s", that is a plain directory, and a file outside of it.
struct Guest {
    server: Server,
    directory: tempfile::TempDir,
    share: u64,
}

fn open_path(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("root/s")).unwrap();
        fs::write(directory.path().join("secret"), "secret").unwrap();
        let server = Server::new(open_path(&directory.path().join("root")), open_path(Path::new("/proc/self/fd")));
        let mut guest = Self { server, directory, share: 0 };
        guest.share = guest.look_up(ROOT, "s").unwrap();
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("root/s").join(name)
    }

    /// The answer's body, or its errno.
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> std::result::Result<Vec<u8>, i32> {
        self.ask_as((0, 0), opcode, node, body)
    }

    fn ask_as(&self, (uid, gid): (u32, u32), opcode: u32, node: u64, body: &[u8]) -> std::result::Result<Vec<u8>, i32> {
        let header = Header { length: 40 + body.len(), opcode, unique: 7, node, uid, gid };
        let mut reply = Reply::default();
        // As in the jail: a system call that its list lacks kills the test.
        let confined = || {
            Filters::compile().confine_worker();
            self.server.answer(header, body, &mut reply).expect("an answer").to_vec()
        };
        let answer = std::thread::scope(|scope| scope.spawn(confined).join().expect("no panic"));
        assert_eq!(answer.len() as u32, u32::from_le_bytes(answer[..4].try_into().unwrap()));
        assert_eq!(u64::from_le_bytes(answer[8..16].try_into().unwrap()), 7);
        match i32::from_le_bytes(answer[4..8].try_into().unwrap()) {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn look_up(&self, parent: u64, name: &str) -> std::result::Result<u64, i32> {
        self.ask(opcode::LOOKUP, parent, &text(name)).map(|entry| number(&entry, 0))
    }

    fn open(&self, node: u64, flags: i32) -> std::result::Result<u64, i32> {
        self.ask(opcode::OPEN, node, &words(&[flags as u32, 0])).map(|answer| number(&answer, 0))
    }

    fn read(&self, node: u64, handle: u64, offset: u64, size: u32) -> std::result::Result<Vec<u8>, i32> {
        let body = [&handle.to_le_bytes()[..], &offset.to_le_bytes(), &words(&[size, 0, 0, 0, 0, 0])].concat();
        self.ask(opcode::READ, node, &body)
    }

    fn write(&self, node: u64, handle: u64, data: &[u8], flags: u32) -> std::result::Result<Vec<u8>, i32> {
        let size = data.len() as u32;
        let body = [&handle.to_le_bytes()[..], &[0; 8], &words(&[size, flags, 0, 0, 0, 0]), data].concat();
        self.ask(opcode::WRITE, node, &body)
    }

    fn forget(&self, node: u64, count: u64) {
        let header = Header { length: 48, opcode: opcode::FORGET, unique: 0, node, uid: 0, gid: 0 };
        assert!(self.server.answer(header, &count.to_le_bytes(), &mut Reply::default()).is_none());
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn setattr_body(valid: u32, size: u64, mode: u32, uid: u32) -> Vec<u8> {
    let mut body = words(&[valid, 0]);
    body.extend([0; 8]);
    body.extend(size.to_le_bytes());
    body.extend([0; 32]);
    body.extend(words(&[0, 0, 0, mode, 0, uid, 0, 0]));
    body
}

#[test]
fn what_the_host_has_is_read() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "contents").unwrap();
    let node = guest.look_up(guest.share, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle, 3, 100).unwrap(), b"tents");
    // The host writes, and the guest reads that.
    fs::write(guest.path("file"), "replaced").unwrap();
    assert_eq!(guest.read(node, handle, 0, 100).unwrap(), b"replaced");
    guest.ask(opcode::RELEASE, node, &[&handle.to_le_bytes()[..], &[0; 16]].concat()).unwrap();
    assert_eq!(guest.read(node, handle, 0, 1), Err(libc::EBADF));
}

#[test]
fn a_file_that_the_host_replaces_is_another_one() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "old").unwrap();
    let old = guest.look_up(guest.share, "file").unwrap();
    fs::write(guest.path("new"), "new").unwrap();
    fs::rename(guest.path("new"), guest.path("file")).unwrap();
    let new = guest.look_up(guest.share, "file").unwrap();
    assert_ne!(old, new);
    let handle = guest.open(new, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(new, handle, 0, 10).unwrap(), b"new");
    let handle = guest.open(old, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(old, handle, 0, 10).unwrap(), b"old");
}

#[test]
fn no_name_leads_out_of_a_directory() {
    let guest = Guest::new();
    symlink("../../secret", guest.path("up")).unwrap();
    symlink("/etc/passwd", guest.path("abs")).unwrap();
    for name in ["..", ".", "", "../../secret", "/etc/passwd", "s/.."] {
        assert_eq!(guest.look_up(guest.share, name), Err(libc::EINVAL), "{name}");
        assert_eq!(guest.look_up(ROOT, name), Err(libc::EINVAL), "{name}");
        for (operation, before) in [
            (opcode::MKDIR, 2),
            (opcode::CREATE, 4),
            (opcode::MKNOD, 4),
            (opcode::UNLINK, 0),
            (opcode::RMDIR, 0),
            (opcode::SYMLINK, 0),
            (opcode::LINK, 2),
            (opcode::RENAME, 2),
        ] {
            let fields = [guest.share as u32, 0, 0, 0];
            let body = [words(&fields[..before]), text(name), text("x")].concat();
            assert_eq!(guest.ask(operation, guest.share, &body), Err(libc::EINVAL), "{name} {operation}");
        }
    }
    // A link is itself, and is not followed by anything.
    for name in ["up", "abs"] {
        let link = guest.look_up(guest.share, name).unwrap();
        assert_eq!(guest.open(link, libc::O_RDONLY), Err(libc::ENXIO));
        assert_eq!(guest.look_up(link, "passwd"), Err(libc::ENOTDIR));
        assert_eq!(guest.ask(opcode::OPENDIR, link, &words(&[0, 0])), Err(libc::ENOTDIR));
        let truncate = setattr_body(setattr::SIZE, 0, 0, 0);
        assert_eq!(guest.ask(opcode::SETATTR, link, &truncate), Err(libc::ELOOP));
        let mode = setattr_body(setattr::MODE, 0, 0o777, 0);
        assert_eq!(guest.ask(opcode::SETATTR, link, &mode), Err(libc::EOPNOTSUPP));
        let create = [words(&[libc::O_WRONLY as u32, 0o644, 0, 0]), text(name)].concat();
        assert_eq!(guest.ask(opcode::CREATE, guest.share, &create), Err(libc::EEXIST));
    }
    assert_eq!(fs::read(guest.directory.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn the_root_cannot_be_changed() {
    let guest = Guest::new();
    let named = [words(&[0o755, 0]), text("x")].concat();
    assert_eq!(guest.ask(opcode::MKDIR, ROOT, &named), Err(libc::EROFS));
    assert_eq!(guest.ask(opcode::RMDIR, ROOT, &text("s")), Err(libc::EROFS));
    assert_eq!(guest.ask(opcode::SYMLINK, ROOT, &[text("x"), text("y")].concat()), Err(libc::EROFS));
    assert_eq!(guest.ask(opcode::SETATTR, ROOT, &setattr_body(setattr::MODE, 0, 0, 0)), Err(libc::EROFS));
    let rename = [&ROOT.to_le_bytes()[..], &text("s"), &text("t")].concat();
    assert_eq!(guest.ask(opcode::RENAME, ROOT, &rename), Err(libc::EROFS));
    assert!(guest.path("").is_dir());
}

#[test]
fn what_is_made_belongs_to_who_made_it() {
    let guest = Guest::new();
    let who = (1234, 5678);
    let create = [words(&[libc::O_RDWR as u32, 0o4750, 0, 0]), text("file")].concat();
    let answer = guest.ask_as(who, opcode::CREATE, guest.share, &create).unwrap();
    let (node, handle) = (number(&answer, 0), number(&answer, 128));
    assert_eq!(guest.write(node, handle, b"data", 0).unwrap(), words(&[4, 0]));
    guest.ask_as(who, opcode::MKDIR, guest.share, &[words(&[0o700, 0]), text("dir")].concat()).unwrap();
    guest.ask_as(who, opcode::SYMLINK, guest.share, &[text("link"), text("file")].concat()).unwrap();
    for name in ["file", "dir", "link"] {
        let metadata = fs::symlink_metadata(guest.path(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), who, "{name}");
    }
    assert_eq!(fs::metadata(guest.path("file")).unwrap().mode() & 0o7777, 0o4750);
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"data");
    // A write by somebody without CAP_FSETID.
    guest.write(node, handle, b"more", crate::fuse::WRITE_KILL_SUIDGID).unwrap();
    assert_eq!(fs::metadata(guest.path("file")).unwrap().mode() & 0o7777, 0o750);
    // The directory's group is handed down.
    fs::set_permissions(guest.path("dir"), fs::Permissions::from_mode(0o2777)).unwrap();
    let directory = guest.look_up(guest.share, "dir").unwrap();
    guest.ask_as((1, 1), opcode::MKDIR, directory, &[words(&[0o700, 0]), text("sub")].concat()).unwrap();
    let metadata = fs::metadata(guest.path("dir/sub")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o2000), (1, 5678, 0o2000));
}

#[test]
fn devices_are_not_made_and_special_files_not_opened() {
    let guest = Guest::new();
    let make = |mode: u32, name: &str| {
        guest.ask(opcode::MKNOD, guest.share, &[words(&[mode, 0x0103, 0, 0]), text(name)].concat())
    };
    assert_eq!(make(libc::S_IFCHR | 0o666, "null"), Err(libc::EPERM));
    assert_eq!(make(libc::S_IFBLK | 0o666, "disk"), Err(libc::EPERM));
    let fifo = number(&make(libc::S_IFIFO | 0o666, "fifo").unwrap(), 0);
    let socket = number(&make(libc::S_IFSOCK | 0o666, "socket").unwrap(), 0);
    assert!(fs::metadata(guest.path("fifo")).unwrap().file_type().is_fifo());
    // Would wait for a writer, if it were opened.
    assert_eq!(guest.open(fifo, libc::O_RDONLY), Err(libc::ENXIO));
    assert_eq!(guest.open(socket, libc::O_RDONLY), Err(libc::ENXIO));
}

#[test]
fn names_are_moved_linked_and_removed() {
    let guest = Guest::new();
    fs::write(guest.path("a"), "1").unwrap();
    fs::write(guest.path("b"), "2").unwrap();
    let rename = |flags: u32, old: &str, new: &str| {
        let body = [&guest.share.to_le_bytes()[..], &words(&[flags, 0]), &text(old), &text(new)].concat();
        guest.ask(opcode::RENAME2, guest.share, &body)
    };
    assert_eq!(rename(libc::RENAME_NOREPLACE, "a", "b"), Err(libc::EEXIST));
    rename(libc::RENAME_EXCHANGE, "a", "b").unwrap();
    assert_eq!(fs::read(guest.path("a")).unwrap(), b"2");
    assert_eq!(rename(libc::RENAME_WHITEOUT, "a", "c"), Err(libc::EINVAL));
    let node = guest.look_up(guest.share, "a").unwrap();
    guest.ask(opcode::LINK, guest.share, &[&node.to_le_bytes()[..], &text("hard")].concat()).unwrap();
    assert_eq!(fs::metadata(guest.path("hard")).unwrap().nlink(), 2);
    guest.ask(opcode::UNLINK, guest.share, &text("a")).unwrap();
    assert!(!guest.path("a").exists());
    assert_eq!(guest.ask(opcode::RMDIR, guest.share, &text("hard")), Err(libc::ENOTDIR));
}

#[test]
fn a_directory_is_read_piece_by_piece() {
    let guest = Guest::new();
    for index in 0..100 {
        fs::write(guest.path(&format!("file-{index}")), "").unwrap();
    }
    let handle = number(&guest.ask(opcode::OPENDIR, guest.share, &words(&[0, 0])).unwrap(), 0);
    let (mut offset, mut names, mut turns) = (0, std::collections::BTreeSet::new(), 0);
    loop {
        let body = [&handle.to_le_bytes()[..], &u64::to_le_bytes(offset), &words(&[512, 0, 0, 0, 0, 0])].concat();
        let answer = guest.ask(opcode::READDIR, guest.share, &body).unwrap();
        if answer.is_empty() {
            break;
        }
        assert!(answer.len() <= 512);
        turns += 1;
        let mut rest = answer.as_slice();
        while !rest.is_empty() {
            offset = number(rest, 8);
            let length = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            assert!(names.insert(String::from_utf8(rest[24..24 + length].to_vec()).unwrap()));
            rest = &rest[(24 + length).next_multiple_of(8)..];
        }
    }
    assert!(turns > 5);
    assert_eq!(names.len(), 102);
    // From anywhere: an answer or an error, and no more.
    for offset in [1, u64::MAX, 1 << 63] {
        let body = [&handle.to_le_bytes()[..], &u64::to_le_bytes(offset), &words(&[512, 0, 0, 0, 0, 0])].concat();
        let _ = guest.ask(opcode::READDIR, guest.share, &body);
    }
}

#[test]
fn only_attributes_of_users_and_file_capabilities_pass() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "").unwrap();
    let node = guest.look_up(guest.share, "file").unwrap();
    let set = |name: &str| guest.ask(opcode::SETXATTR, node, &[words(&[1, 0]), text(name), b"v".to_vec()].concat());
    for refused in ["trusted.overlay.opaque", "security.selinux", "system.posix_acl_access", "users"] {
        assert_eq!(set(refused), Err(libc::EOPNOTSUPP), "{refused}");
        let get = [words(&[10, 0]), text(refused)].concat();
        assert_eq!(guest.ask(opcode::GETXATTR, node, &get), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.ask(opcode::REMOVEXATTR, node, &text(refused)), Err(libc::EOPNOTSUPP));
    }
    // tmpfs of older kernels has no user attributes.
    if set("user.x").is_ok() {
        let get = |size| guest.ask(opcode::GETXATTR, node, &[words(&[size, 0]), text("user.x")].concat());
        assert_eq!(get(10).unwrap(), b"v");
        assert_eq!(get(0).unwrap(), words(&[1, 0]));
        assert_eq!(guest.ask(opcode::LISTXATTR, node, &words(&[100, 0])).unwrap(), b"user.x\0");
        guest.ask(opcode::REMOVEXATTR, node, &text("user.x")).unwrap();
        assert_eq!(get(10), Err(libc::ENODATA));
    }
}

#[test]
fn a_number_lives_until_it_is_forgotten_as_often_as_it_was_given() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "x").unwrap();
    let node = guest.look_up(guest.share, "file").unwrap();
    assert_eq!(guest.look_up(guest.share, "file").unwrap(), node);
    guest.forget(node, 1);
    guest.open(node, libc::O_RDONLY).unwrap();
    guest.forget(node, 1);
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ESTALE));
    assert_ne!(guest.look_up(guest.share, "file").unwrap(), node);
    // The root stays whatever the guest says, and so does what was never given.
    guest.forget(ROOT, u64::MAX);
    guest.forget(12345, u64::MAX);
    assert!(guest.look_up(ROOT, "s").is_ok());
}

#[test]
fn a_share_that_is_taken_away_is_closed() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "x").unwrap();
    let node = guest.look_up(guest.share, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    guest.server.forget_shares(|share| share == "other");
    assert_eq!(guest.read(node, handle, 0, 1).unwrap(), b"x");
    guest.server.forget_shares(|share| share == "s");
    assert_eq!(guest.read(node, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ESTALE));
    assert_eq!(guest.look_up(guest.share, "file"), Err(libc::ESTALE));
}

#[test]
fn what_is_asked_wrongly_is_an_error_and_no_more() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "x").unwrap();
    let node = guest.look_up(guest.share, "file").unwrap();
    let bodies =
        [vec![], vec![0; 3], vec![0xff; 7], vec![0xff; 40], vec![0xff; 200], vec![0; 200], text("x").repeat(50)];
    for operation in (0..60).filter(|code| !matches!(*code, opcode::FORGET | opcode::BATCH_FORGET | opcode::DESTROY)) {
        for target in [0, ROOT, guest.share, node, 999, u64::MAX] {
            for body in &bodies {
                // Nothing panics, and an answer comes; most are errors.
                let _ = guest.ask(operation, target, body);
            }
        }
    }
    for opcode in [opcode::FORGET, opcode::BATCH_FORGET] {
        for body in &bodies {
            let header = Header { length: 0, opcode, unique: 0, node: 999, uid: 0, gid: 0 };
            guest.server.answer(header, body, &mut Reply::default());
        }
    }
    assert_eq!(guest.ask(opcode::READ, node, &words(&[0, 0, 0, 0, u32::MAX, 0])), Err(libc::EINVAL));
    assert_eq!(fs::read(guest.directory.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn the_session_agrees_on_what_both_can() {
    let guest = Guest::new();
    let init = |flags: u32, flags2: u32| {
        guest.ask(opcode::INIT, 0, &[words(&[7, 41, 131072, flags, flags2]), vec![0; 44]].concat()).unwrap()
    };
    let answer = init(u32::MAX, u32::MAX);
    assert_eq!((answer.len(), &answer[..8]), (64, &words(&[7, 41])[..]));
    assert_eq!(answer[20..24], words(&[1 << 20]));
    assert_eq!(answer[28..30], 256u16.to_le_bytes());
    // flags2: DIRECT_IO_ALLOW_MMAP and ALLOW_IDMAP.
    assert_eq!(answer[32..36], words(&[1 << 4 | 1 << 8]));
    assert_eq!(init(0, u32::MAX)[12..16], [0; 4]);
    assert_eq!(guest.ask(opcode::INIT, 0, &words(&[6, 0, 0, 0, 0])), Err(libc::EPROTO));
}
