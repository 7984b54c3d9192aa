use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use super::*;

/// A mirror in a directory of the test's, without a file system of its own.
struct Fixture {
    directory: tempfile::TempDir,
    root: File,
    staging: File,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            fs::create_dir(directory.path().join(name)).unwrap();
            File::open(directory.path().join(name)).unwrap()
        };
        let (root, staging) = (open("root"), open("staging"));
        Self { directory, root, staging }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join("root").join(name)
    }

    fn apply(&self, tree: &Tree) {
        apply(self.root.as_fd(), self.staging.as_fd(), tree).map_err(|error| error.chain()).unwrap();
        assert_eq!(fs::read_dir(self.directory.path().join("staging")).unwrap().count(), 0);
    }

    fn found(&self) -> Tree {
        found(&self.path(""))
    }

    /// A watch on the root, which gives what happened since the last time it was asked: names and events.
    fn watch(&self) -> impl FnMut() -> Vec<(String, ReadFlags)> + use<> {
        let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        let unseen = WatchFlags::ACCESS | WatchFlags::OPEN | WatchFlags::CLOSE_NOWRITE;
        inotify::add_watch(&watch, self.path(""), WatchFlags::ALL_EVENTS - unseen).unwrap();
        move || read_events(&watch)
    }
}

fn read_events(watch: &OwnedFd) -> Vec<(String, ReadFlags)> {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch, &mut buffer);
    let mut events = Vec::new();
    while let Ok(event) = reader.next() {
        let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
        events.push((name.unwrap_or_default(), event.events() - ReadFlags::ISDIR));
    }
    events
}

fn me(mode: u32) -> Owner {
    Owner { mode, uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
}

fn tree(entries: &[(&str, Entry)]) -> Tree {
    let entries = entries.iter().map(|(name, entry)| (name.as_bytes().to_vec(), entry.clone())).collect();
    Tree { owner: me(0o755), entries }
}

fn file(text: &str) -> Entry {
    Entry::File(me(0o644), text.as_bytes().to_vec())
}

fn link(target: &str) -> Entry {
    Entry::Symlink(me(0o777), target.as_bytes().to_vec())
}

/// A volume as the kubelet's writer leaves it: files of these names that hold `version`.
fn volume(version: &str, names: &[&str]) -> Tree {
    let files: Vec<_> = names.iter().map(|name| (*name, file(version))).collect();
    let (stamp, targets): (_, Vec<_>) =
        (format!("..{version}"), names.iter().map(|name| format!("..data/{name}")).collect());
    let mut entries = vec![(stamp.as_str(), Entry::Directory(tree(&files))), ("..data", link(&stamp))];
    entries.extend(names.iter().zip(&targets).map(|(name, target)| (*name, link(target))));
    tree(&entries)
}

/// What a directory shows.
fn found(path: &Path) -> Tree {
    let owner =
        |metadata: &fs::Metadata| Owner { mode: metadata.mode() & 0o7777, uid: metadata.uid(), gid: metadata.gid() };
    let entry = |entry: fs::DirEntry| {
        let metadata = entry.metadata().unwrap();
        let shown = if metadata.is_dir() {
            Entry::Directory(found(&entry.path()))
        } else if metadata.is_symlink() {
            let target = fs::read_link(entry.path()).unwrap();
            Entry::Symlink(Owner { mode: 0o777, ..owner(&metadata) }, target.as_os_str().as_bytes().to_vec())
        } else {
            Entry::File(owner(&metadata), fs::read(entry.path()).unwrap())
        };
        (entry.file_name().as_bytes().to_vec(), shown)
    };
    let entries = fs::read_dir(path).unwrap().map(|item| entry(item.unwrap())).collect();
    Tree { owner: owner(&fs::metadata(path).unwrap()), entries }
}

#[test]
fn an_update_of_the_kubelets_is_seen_as_on_its_node() {
    let fixture = Fixture::new();
    fixture.apply(&volume("1", &["a", "b"]));
    let on_file = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&on_file, fixture.path("a"), WatchFlags::ATTRIB | WatchFlags::DELETE_SELF).unwrap();
    let mut events = fixture.watch();
    fixture.apply(&volume("2", &["a", "c"]));
    assert_eq!(
        events(),
        [
            ("..2", ReadFlags::MOVED_TO),
            ("..data", ReadFlags::MOVED_TO),
            ("c", ReadFlags::CREATE),
            ("b", ReadFlags::DELETE),
            ("..1", ReadFlags::DELETE),
        ]
        .map(|(name, flags)| (name.to_owned(), flags))
    );
    // As a program sees it that watches the file rather than its directory: a name less, then gone.
    let gone = [ReadFlags::ATTRIB, ReadFlags::DELETE_SELF].map(|flags| (String::new(), flags));
    assert_eq!(read_events(&on_file)[..2], gone);
    assert_eq!(fixture.found(), volume("2", &["a", "c"]));
    // The same once more is no change.
    fixture.apply(&volume("2", &["a", "c"]));
    assert_eq!(events(), []);
}

#[test]
fn a_change_of_owner_or_mode_alone_changes_the_same_file() {
    let fixture = Fixture::new();
    fixture.apply(&tree(&[("f", file("x"))]));
    let inode = fs::metadata(fixture.path("f")).unwrap().ino();
    let mut events = fixture.watch();
    let narrow = tree(&[("f", Entry::File(me(0o400), b"x".to_vec()))]);
    fixture.apply(&narrow);
    assert_eq!(events(), [("f".to_owned(), ReadFlags::ATTRIB)]);
    assert_eq!((fixture.found(), fs::metadata(fixture.path("f")).unwrap().ino()), (narrow, inode));
}

#[test]
fn links_that_somebody_made_there_lead_nowhere() {
    let fixture = Fixture::new();
    let wanted = tree(&[("d", Entry::Directory(tree(&[("f", file("new"))]))), ("f", file("new"))]);
    let outside = fixture.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("f"), "old").unwrap();
    symlink(&outside, fixture.path("d")).unwrap();
    symlink(outside.join("f"), fixture.path("f")).unwrap();
    symlink(&outside, fixture.path("gone")).unwrap();
    fs::create_dir(fixture.path("stray")).unwrap();
    symlink(&outside, fixture.path("stray/gone")).unwrap();
    fixture.apply(&wanted);
    assert_eq!(fixture.found(), wanted);
    assert_eq!(fs::read_to_string(outside.join("f")).unwrap(), "old");
    assert!(fs::metadata(&outside).unwrap().permissions().mode() & 0o7777 == 0o755);
}

#[test]
fn a_fifo_in_the_place_of_a_file_stops_nobody() {
    let fixture = Fixture::new();
    rustix::fs::mknodat(&fixture.root, "f", FileType::Fifo, Mode::RWXU, 0).unwrap();
    fixture.apply(&tree(&[("f", file("x"))]));
    assert_eq!(fixture.found(), tree(&[("f", file("x"))]));
}

#[test]
fn what_a_failed_update_left_is_gone_after_the_next() {
    let fixture = Fixture::new();
    fs::create_dir_all(fixture.directory.path().join("staging/new0/deep")).unwrap();
    fixture.apply(&volume("1", &["a"]));
    assert_eq!(fixture.found(), volume("1", &["a"]));
}

#[test]
fn a_reader_through_data_sees_no_mixture() {
    let fixture = Fixture::new();
    fixture.apply(&volume("1", &["a", "b"]));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut whole = 0;
            while !done.load(Ordering::Relaxed) {
                // The link always leads somewhere.
                let data = match File::open(fixture.path("..data")) {
                    Ok(data) => data,
                    // Between the walk of the link and that of its target the old directory went.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(error) => panic!("{error}"),
                };
                let read = |name: &str| {
                    let file = rustix::fs::openat(&data, name, OFlags::RDONLY, Mode::empty()).ok()?;
                    let mut text = String::new();
                    File::from(file).read_to_string(&mut text).unwrap();
                    Some(text)
                };
                // The old state may be removed meanwhile, as on a node; a file is there whole or not at all.
                if let (Some(a), Some(b)) = (read("a"), read("b")) {
                    assert!(a == b && !a.is_empty(), "{a:?} beside {b:?}");
                    whole += 1;
                }
                assert!(fs::symlink_metadata(fixture.path("..data")).unwrap().is_symlink());
            }
            whole
        });
        for version in 2..400 {
            fixture.apply(&volume(&version.to_string(), &["a", "b"]));
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 0);
    });
}

fn entry() -> impl Strategy<Value = Entry> {
    let mode = || prop_oneof![Just(0o600), Just(0o644), Just(0o755), Just(0o2750)];
    let leaf = prop_oneof![
        (mode(), "[xy]{0,3}").prop_map(|(mode, text)| Entry::File(me(mode), text.into_bytes())),
        "(\\.\\.)?[ab]".prop_map(|target| Entry::Symlink(me(0o777), target.into_bytes())),
    ];
    leaf.prop_recursive(3, 24, 4, move |inner| some_tree(inner).prop_map(Entry::Directory))
}

fn some_tree(entry: impl Strategy<Value = Entry>) -> impl Strategy<Value = Tree> {
    let mode = prop_oneof![Just(0o700), Just(0o755), Just(0o2775)];
    let name = prop_oneof![Just("..data"), Just("..1"), Just("..2"), Just("a"), Just("b"), Just("c")];
    let entries = proptest::collection::btree_map(name.prop_map(|name: &str| name.as_bytes().to_vec()), entry, 0..5);
    (mode, entries).prop_map(|(mode, entries)| Tree { owner: me(mode), entries })
}

proptest! {
    #[test]
    fn any_tree_over_any_other_is_exactly_that_tree(before in some_tree(entry()), after in some_tree(entry())) {
        let fixture = Fixture::new();
        for tree in [&before, &after] {
            fixture.apply(tree);
            prop_assert_eq!(&fixture.found(), tree);
        }
        let mut events = fixture.watch();
        fixture.apply(&after);
        prop_assert_eq!(events(), []);
    }
}
