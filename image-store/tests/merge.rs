//! What is read from the merged file system of several layers against what these mean one over the other.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use isopod_image_store::{Limits, MergeError, convert_blob, merge_layers};
use isopod_proto::ErrorKind;
use proptest::prelude::*;
use sha2::Digest as _;
use support::layers::{Kind, build, entries_strategy, fsck, read_back, stack};
use support::{Item, noise, tar, verify};
use tempfile::TempDir;

const ALIGNMENT: usize = 512 << 10;

/// The layers' files, made of their tars.
fn layers(directory: &Path, tars: &[Vec<u8>]) -> Vec<PathBuf> {
    let convert = |(number, tar): (usize, &Vec<u8>)| {
        let path = directory.join(format!("layer-{number}"));
        convert_blob(tar.as_slice(), &path, &Limits::default()).unwrap();
        path
    };
    tars.iter().enumerate().map(convert).collect()
}

/// The bytes of the whole disk, without its hash tree, which is held against them.
fn disk(directory: &Path, layers: &[PathBuf]) -> Vec<u8> {
    let path = directory.join("metadata");
    let merged = merge_layers(layers, &path, &Limits::default()).unwrap();
    let (mut disk, mut hashes) = (Vec::new(), Vec::new());
    for file in std::iter::once(&path).chain(layers) {
        let bytes = std::fs::read(file).unwrap();
        let data = if disk.is_empty() { merged.metadata_bytes as usize } else { bytes.len() / 129 * 128 };
        disk.extend_from_slice(&bytes[..data]);
        hashes.extend_from_slice(&bytes[data..]);
        assert_eq!(disk.len() % ALIGNMENT, 0);
    }
    verify(&[&disk[..], &hashes].concat(), merged.verity);
    let whole = directory.join("disk");
    std::fs::write(&whole, &disk).unwrap();
    fsck(&whole);
    disk
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn layers_show_together_what_they_mean(stacked in prop::collection::vec(entries_strategy(), 1..5)) {
        let (tars, models): (Vec<_>, Vec<_>) = stacked.iter().map(|entries| build(entries)).unzip();
        let directory = TempDir::new().unwrap();
        let (root, tree) = read_back(&disk(directory.path(), &layers(directory.path(), &tars)));
        let (expected_root, expected) = stack(&models);
        prop_assert_eq!(root, expected_root);
        let shown = |path: &Vec<u8>| path.escape_ascii().to_string();
        prop_assert_eq!(tree.keys().map(shown).collect::<Vec<_>>(), expected.keys().map(shown).collect::<Vec<_>>());
        let mut identities = BTreeMap::new();
        for (path, (node, id)) in &expected {
            let (found, nid) = &tree[path];
            prop_assert_eq!(found, node, "{}", shown(path));
            prop_assert_eq!(*identities.entry(*id).or_insert(*nid), *nid, "{}", shown(path));
        }
        let distinct: BTreeSet<_> = tree.values().map(|(_, nid)| nid).collect();
        prop_assert_eq!(distinct.len(), identities.len());
    }

    #[test]
    fn a_damaged_layer_is_merged_or_refused(entries in entries_strategy(), cut in any::<prop::sample::Index>(), hashed in any::<bool>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let directory = TempDir::new().unwrap();
        let paths = layers(directory.path(), &[build(&entries).0]);
        let mut bytes = std::fs::read(&paths[0]).unwrap();
        // Where there is something; holes say nothing.
        let data = bytes.len() / 129 * 128;
        let used = bytes[..data].iter().rposition(|byte| *byte != 0).unwrap();
        for (index, value) in flips {
            bytes[4096 + index.index(used - 4095)] = value;
        }
        // With the hashes that it should have, so that it is looked at: once in two.
        if hashed {
            let hashes: Vec<u8> = bytes[..data].chunks(4096).flat_map(sha2::Sha256::digest).collect();
            bytes[data..].copy_from_slice(&hashes);
        }
        std::fs::write(&paths[0], &bytes).unwrap();
        let _ = merge_layers(&paths, &directory.path().join("metadata"), &Limits::default());
        bytes.truncate(cut.index(used));
        std::fs::write(&paths[0], &bytes).unwrap();
        let error = merge_layers(&paths, &directory.path().join("other"), &Limits::default()).unwrap_err();
        prop_assert!(matches!(error, MergeError::Damaged { .. }), "{error:?}");
    }
}

#[test]
fn a_directory_that_is_implied_keeps_what_a_lower_layer_says_of_it() {
    let directory = TempDir::new().unwrap();
    let named = |mode: u32| {
        let mut header = tar::Header::new_ustar();
        header.set_path("private").unwrap();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(mode);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(9);
        header.set_size(0);
        header.set_cksum();
        [&header.as_bytes()[..], &[0; 1024]].concat()
    };
    let tars = [named(0o700), tar(&[Item::File("private/new", b"1"), Item::File("other/new", b"2")])];
    let (_, tree) = read_back(&disk(directory.path(), &layers(directory.path(), &tars)));
    let private = &tree[&b"private"[..]].0;
    assert_eq!((private.mode & 0o7777, private.uid, private.gid, private.mtime.0), (0o700, 7, 8, 9));
    assert_eq!(tree[&b"private/new"[..]].0.kind, Kind::File(b"1".to_vec()));
    let other = &tree[&b"other"[..]].0;
    assert_eq!((other.mode & 0o7777, other.uid, other.xattrs.len()), (0o755, 0, 0));
}

#[test]
fn what_is_removed_can_come_again_as_something_else() {
    let directory = TempDir::new().unwrap();
    let tars = [
        tar(&[Item::File("a/b", b"1"), Item::Link("linked", "a/b"), Item::Symlink("s", "a"), Item::File("f", b"2")]),
        tar(&[Item::File(".wh.a", b""), Item::File("s/inside", b"3"), Item::File(".wh.f", b"")]),
        tar(&[Item::Symlink("a", "s"), Item::Link("again", "a"), Item::File("f/g", b"4")]),
    ];
    let (_, tree) = read_back(&disk(directory.path(), &layers(directory.path(), &tars)));
    let names: Vec<_> = tree.keys().map(|path| String::from_utf8(path.clone()).unwrap()).collect();
    assert_eq!(names, ["a", "again", "f", "f/g", "linked", "s", "s/inside"]);
    assert_eq!(
        tree[&b"linked"[..]].0.kind,
        Kind::File(b"1".to_vec()),
        "a link lives on without the name it was made of"
    );
    assert_eq!(tree[&b"a"[..]], tree[&b"again"[..]]);
}

#[test]
fn a_layer_whose_metadata_are_not_what_was_hashed_is_refused() {
    let directory = TempDir::new().unwrap();
    let paths = layers(directory.path(), &[tar(&[Item::File("name-of-a-file", b"data")])]);
    let whole = std::fs::read(&paths[0]).unwrap();
    let name = whole.windows(14).position(|bytes| bytes == b"name-of-a-file").unwrap();
    let refused = |position: usize| {
        let mut bytes = whole.clone();
        bytes[position] ^= 1;
        std::fs::write(&paths[0], bytes).unwrap();
        let output = directory.path().join("metadata");
        let error = merge_layers(&paths, &output, &Limits::default()).unwrap_err();
        std::fs::remove_file(output).unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    };
    refused(name);
    // The hash of its block, and the superblock.
    refused(whole.len() / 129 * 128 + name / 4096 * 32);
    refused(1100);
}

#[test]
fn layers_of_too_much_are_refused() {
    let directory = TempDir::new().unwrap();
    let files: Vec<String> = (0..30).map(|number| format!("file-{number:02}")).collect();
    let items: Vec<Item<'_>> = files.iter().map(|name| Item::File(name, b"x")).collect();
    let paths = layers(directory.path(), &[tar(&items), tar(&items)]);
    let refused = |limits: Limits, word: &str| {
        let output = directory.path().join("metadata");
        let error = merge_layers(&paths, &output, &limits).unwrap_err();
        std::fs::remove_file(output).unwrap();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(Limits { max_entries: 50, ..Limits::default() }, "50 files and directories");
    refused(Limits { max_entries: 10, ..Limits::default() }, "20 names");
    refused(Limits { max_metadata_bytes: 300, ..Limits::default() }, "300 bytes of metadata");
}

#[test]
fn root_the_kernel_mounts_many_layers_as_one_file_system() {
    if !support::root() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let tars: Vec<_> = (0..127u64)
        .map(|number| {
            let (own, data) = (format!("layers/{number:03}"), noise(number as usize * 1000 % 9000, number));
            let mut items = vec![Item::File(&own, &data), Item::File("last", &data)];
            let hidden = format!("layers/.wh.{:03}", number.saturating_sub(3));
            if number % 3 == 0 && number > 0 {
                items.push(Item::File(&hidden, b""));
            }
            tar(&items)
        })
        .collect();
    disk(directory.path(), &layers(directory.path(), &tars));
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(path("mount")).unwrap();
    support::run("mount", &["-t", "erofs", "-o", "loop,ro", &path("disk"), &path("mount")]);
    let check = || {
        let data = |number: u64| noise(number as usize * 1000 % 9000, number);
        assert_eq!(std::fs::read(path("mount/last")).unwrap(), data(126));
        let mut names: Vec<_> =
            std::fs::read_dir(path("mount/layers")).unwrap().map(|it| it.unwrap().file_name()).collect();
        names.sort();
        let expected: Vec<u64> = (0..127).filter(|number| number % 3 != 0 || *number == 126).collect();
        assert_eq!(names.len(), expected.len());
        for (name, number) in names.iter().zip(expected) {
            assert_eq!(*name, *format!("{number:03}"));
            assert!(std::fs::read(directory.path().join("mount/layers").join(name)).unwrap() == data(number));
        }
    };
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
    support::run("umount", &[&path("mount")]);
    checked.unwrap();
}
