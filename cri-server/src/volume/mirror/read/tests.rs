use std::cell::Cell;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn take(path: &Path) -> Result<MirrorEntry, ReadError> {
    let snapshot = read(path, &|_| ())?;
    Ok(MirrorEntry::decode(snapshot.content.as_slice()).expect("what was encoded"))
}

/// Changes the volume at `path` as the kubelet's atomic writer does, to files of these names that hold `version`.
fn update(path: &Path, version: u32, names: &[&str]) {
    let stamp = format!("..{version}");
    fs::create_dir(path.join(&stamp)).expect("made");
    for name in names {
        fs::write(path.join(&stamp).join(name), version.to_string()).expect("written");
    }
    let old = fs::read_link(path.join("..data")).ok();
    symlink(&stamp, path.join("..data_tmp")).expect("made");
    fs::rename(path.join("..data_tmp"), path.join("..data")).expect("renamed");
    for name in names {
        if fs::symlink_metadata(path.join(name)).is_err() {
            symlink(format!("..data/{name}"), path.join(name)).expect("made");
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(path.join(old)).expect("removed");
    }
}

fn entries(entry: &MirrorEntry) -> &[MirrorEntry] {
    match &entry.kind {
        Some(mirror_entry::Kind::Directory(directory)) => &directory.entries,
        other => panic!("{other:?} is no directory"),
    }
}

fn at<'a>(entry: &'a MirrorEntry, name: &str) -> &'a MirrorEntry {
    entries(entry).iter().find(|entry| entry.name == name.as_bytes()).expect(name)
}

#[test]
fn a_volume_is_taken_with_its_links_modes_and_owners() {
    let directory = tempfile::tempdir().expect("a directory");
    update(directory.path(), 1, &["a", "b"]);
    fs::set_permissions(directory.path().join("..1/a"), fs::Permissions::from_mode(0o400)).expect("set");
    let seen = Cell::new(0);
    let snapshot = read(directory.path(), &|_| seen.set(seen.get() + 1)).expect("taken");
    assert_eq!(seen.get(), 2, "the root and the files' directory are watched");
    let root = MirrorEntry::decode(snapshot.content.as_slice()).expect("whole");
    let names: Vec<_> = names(&root).map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    assert_eq!(names, ["..1", "..data", "a", "b"]);
    assert_eq!(at(&root, "..data").kind, Some(mirror_entry::Kind::Symlink(b"..1".to_vec())));
    assert_eq!(at(&root, "b").kind, Some(mirror_entry::Kind::Symlink(b"..data/b".to_vec())));
    let file = at(at(&root, "..1"), "a");
    assert_eq!((file.mode, file.uid), (0o400, rustix::process::getuid().as_raw()));
    assert_eq!(file.kind, Some(mirror_entry::Kind::File(b"1".to_vec())));
    // The same again has the same digest; a mode alone makes another.
    let again = read(directory.path(), &|_| ()).expect("taken");
    assert!((&again.content, again.digest) == (&snapshot.content, snapshot.digest) && again.read_at > snapshot.read_at);
    fs::set_permissions(directory.path().join("..1/a"), fs::Permissions::from_mode(0o440)).expect("set");
    assert_ne!(read(directory.path(), &|_| ()).expect("taken").digest, snapshot.digest);
}

#[test]
fn links_are_not_followed() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("secret"), "no").expect("written");
    let volume = directory.path().join("volume");
    fs::create_dir(&volume).expect("made");
    symlink("../secret", volume.join("out")).expect("made");
    symlink("/", volume.join("root")).expect("made");
    let root = take(&volume).expect("taken");
    assert!(entries(&root).iter().all(|entry| matches!(entry.kind, Some(mirror_entry::Kind::Symlink(_)))));
    // Nor is one that stands for the volume itself.
    symlink(&volume, directory.path().join("link")).expect("made");
    assert!(matches!(take(&directory.path().join("link")), Err(ReadError::Gone(_))));
}

#[test]
fn what_a_mirror_cannot_be_is_told_by_its_name() {
    let directory = tempfile::tempdir().expect("a directory");
    assert!(matches!(take(&directory.path().join("none")), Err(ReadError::Gone(_))));
    let special = directory.path().join("special");
    fs::create_dir(&special).expect("made");
    rustix::fs::mknodat(CWD, special.join("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("made");
    let error = take(&special).expect_err("refused").to_string();
    assert!(error.contains("fifo"), "{error}");

    let large = directory.path().join("large");
    fs::create_dir(&large).expect("made");
    // Its name counts as well.
    let file = File::create(large.join("f")).expect("made");
    file.set_len(MAX_MIRROR_BYTES as u64 - 1).expect("grown");
    assert!(take(&large).is_ok());
    file.set_len(MAX_MIRROR_BYTES as u64).expect("grown");
    assert!(matches!(take(&large), Err(ReadError::TooLarge { .. })));

    let deep = directory.path().join("deep");
    let mut path = deep.clone();
    path.extend(std::iter::repeat_n("d", MAX_MIRROR_DEPTH));
    fs::create_dir_all(&path).expect("made");
    assert!(take(&deep).is_ok());
    fs::create_dir(path.join("d")).expect("made");
    assert!(matches!(take(&deep), Err(ReadError::TooLarge { .. })));

    let many = directory.path().join("many");
    fs::create_dir(&many).expect("made");
    for number in 0..=MAX_MIRROR_ENTRIES {
        fs::write(many.join(number.to_string()), "").expect("written");
    }
    assert!(matches!(take(&many), Err(ReadError::TooLarge { .. })));
    fs::remove_file(many.join("0")).expect("removed");
    assert!(take(&many).is_ok());
}

#[test]
fn what_is_taken_while_it_changes_is_one_state() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    update(path, 1, &["a", "b", "c"]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut version = 1;
            while !done.load(Ordering::Relaxed) {
                version += 1;
                update(path, version, &["a", "b", "c"]);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let mut taken = 0;
        for _ in 0..200 {
            match take(path) {
                Ok(root) => {
                    let Some(mirror_entry::Kind::Symlink(target)) = &at(&root, "..data").kind else {
                        panic!("no link")
                    };
                    let data = at(&root, std::str::from_utf8(target).expect("a name"));
                    let version = mirror_entry::Kind::File(target[2..].to_vec());
                    assert!(
                        ["a", "b", "c"].iter().all(|name| at(data, name).kind.as_ref() == Some(&version)),
                        "{root:?}"
                    );
                    taken += 1;
                }
                Err(ReadError::Changing(_)) => {}
                Err(error) => panic!("{error}"),
            }
            if taken == 20 {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(taken > 0);
    });
}
