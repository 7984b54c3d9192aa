//! What is read back from an image against what the tar held: by an independent reader, by fsck.erofs, and by the kernel.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use isopod_image_store::{Limits, convert_blob};
use proptest::prelude::*;
use support::layers::{
    Kind, Tree, build, convert, empty_file, entries_strategy, fsck, implied, read_back, write_entry,
};
use support::{append, noise};
use tempfile::TempDir;

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn what_the_tar_held_is_read_back(entries in entries_strategy()) {
        let (tar, model) = build(&entries);
        let image = convert(&tar);
        prop_assert_eq!(&image, &convert(&tar), "the same tar gives the same bytes");
        let (root, tree) = read_back(&image);
        prop_assert_eq!(root, model.root.clone().unwrap_or_else(implied));
        let paths = |tree: &Tree| tree.keys().map(|path| path.escape_ascii().to_string()).collect::<Vec<_>>();
        prop_assert_eq!(paths(&tree), paths(&model.tree));
        let mut identities = BTreeMap::new();
        for (path, (expected, id)) in &model.tree {
            let (node, nid) = &tree[path];
            prop_assert_eq!(node, expected, "{}", path.escape_ascii());
            prop_assert_eq!(*identities.entry(*id).or_insert(*nid), *nid, "{}", path.escape_ascii());
        }
        let distinct: std::collections::BTreeSet<_> = tree.values().map(|(_, nid)| nid).collect();
        prop_assert_eq!(distinct.len(), identities.len());
    }

    #[test]
    fn any_bytes_are_converted_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..3000), flips in
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), entries in entries_strategy()) {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("image.erofs");
        let _ = convert_blob(bytes.as_slice(), &path, &Limits::default());
        let _ = std::fs::remove_file(&path);
        // Mostly valid: a flip in a header needs its checksum put right to be looked at.
        let (mut tar, _) = build(&entries);
        for (index, value) in flips {
            let at = index.index(tar.len());
            tar[at] = value;
            let block = at / 512 * 512;
            if tar[block + 257..block + 262] == *b"ustar" {
                let sum: u32 = tar[block..block + 512]
                    .iter()
                    .enumerate()
                    .map(|(i, byte)| if (148..156).contains(&i) { 32 } else { u32::from(*byte) })
                    .sum();
                tar[block + 148..block + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        let limits = Limits { max_layer_bytes: 64 << 20, ..Limits::default() };
        if convert_blob(tar.as_slice(), &path, &limits).is_ok() {
            read_back(&std::fs::read(&path).unwrap());
        }
    }
}

/// A tar as GNU tar makes it of a directory with `options`.
fn gnu_tar(directory: &Path, options: &[&str]) -> Vec<u8> {
    let mut command = std::process::Command::new("tar");
    let output = command.args(options).arg("-C").arg(directory).args(["-cf", "-", "."]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn sparse_files_of_every_format_read_back_whole() {
    let directory = TempDir::new().unwrap();
    let file = std::fs::File::create(directory.path().join("sparse")).unwrap();
    file.set_len(3 << 20).unwrap();
    use std::os::unix::fs::FileExt;
    // More stretches than fit the first header.
    for index in 0..40u64 {
        file.write_all_at(&noise(5000, index), index * 70_000).unwrap();
    }
    let expected = std::fs::read(directory.path().join("sparse")).unwrap();
    for options in [
        &["--format=gnu", "--sparse"][..],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
    ] {
        let tar = gnu_tar(directory.path(), options);
        assert!(tar.len() < 1 << 20, "{options:?} stores holes");
        let (_, tree) = read_back(&convert(&tar));
        let (node, _) = &tree[&b"sparse"[..]];
        assert!(node.kind == Kind::File(expected.clone()), "{options:?}");
    }
}

#[test]
fn long_names_of_gnu_and_large_directories_read_back() {
    let directory = TempDir::new().unwrap();
    let deep = directory.path().join(["d".repeat(200), "e".repeat(200)].join("/"));
    std::fs::create_dir_all(&deep).unwrap();
    for index in 0..3000 {
        std::fs::write(deep.join(format!("file-{index}")), index.to_string()).unwrap();
    }
    std::os::unix::fs::symlink("t".repeat(300), directory.path().join("long")).unwrap();
    std::fs::hard_link(deep.join("file-7"), directory.path().join("hard")).unwrap();
    for format in ["--format=gnu", "--format=pax", "--format=posix"] {
        let (_, tree) = read_back(&convert(&gnu_tar(directory.path(), &[format])));
        assert_eq!(tree.len(), 3004);
        assert_eq!(tree[&b"long"[..]].0.kind, Kind::Symlink(vec![b't'; 300]));
        let linked = format!("{}/{}/file-7", "d".repeat(200), "e".repeat(200));
        assert_eq!(tree[&b"hard"[..]], tree[linked.as_bytes()]);
    }
}

#[test]
fn a_root_directory_of_any_size_is_found() {
    // Each file adds 12 + 200 bytes to the root's entries, and `last` moves their end byte by byte past that of the first block.
    let names = |last: usize| (0..18).map(|i| format!("{i:0200}")).chain([format!("x{}", "y".repeat(last))]);
    for last in 0..250 {
        let mut tar = Vec::new();
        names(last).for_each(|name| write_entry(&mut tar, name.as_bytes(), &empty_file(), None));
        tar.resize(tar.len() + 1024, 0);
        let (root, tree) = read_back(&convert(&tar));
        assert_eq!((root.kind, tree.len()), (Kind::Dir, 19), "with a last name of {} bytes", last + 1);
    }
}

#[test]
fn a_tar_of_too_much_is_refused() {
    use support::{Item, tar};
    let directory = TempDir::new().unwrap();
    let refused = |tar: &[u8], limits: Limits, word: &str| {
        let path = directory.path().join("image.erofs");
        let error = convert_blob(tar, &path, &limits).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        assert!(!path.exists(), "nothing stays behind");
    };
    let small = tar(&[Item::File("a", b"1"), Item::File("b/c/d", b"22")]);
    let limits = Limits::default();
    refused(&small, Limits { max_entries: 1, ..limits.clone() }, "more than the 1 ");
    refused(&small, Limits { max_entries: 4, ..limits.clone() }, "more than the 4 files and directories");
    refused(&small, Limits { max_depth: 2, ..limits.clone() }, "too deep");
    refused(&small, Limits { max_path_bytes: 4, ..limits.clone() }, "too long");
    refused(&small, Limits { max_metadata_bytes: 5, ..limits.clone() }, "metadata");
    refused(&small, Limits { max_layer_bytes: 100, ..limits.clone() }, "100");
    refused(&small[..700], limits.clone(), "ends within");
    refused(&tar(&[Item::File(&"x".repeat(100), b""), Item::Dir("..")]), limits.clone(), "\"..\"");
    // A hole of a terabyte costs nothing to send.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_path("huge").unwrap();
    header.set_size(0);
    header.as_gnu_mut().unwrap().set_real_size(1 << 40);
    header.set_cksum();
    let mut bytes = Vec::new();
    append(&mut bytes, &header, b"");
    refused(&bytes, limits, "bytes of file data");
}

#[test]
fn root_the_kernel_mounts_what_was_made_and_tar_finds_no_difference() {
    if !support::root() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(path("mount")).unwrap();
    std::fs::create_dir(path("source")).unwrap();
    support::run("cp", &["-a", "/etc", &path("source")]);
    support::run("mknod", &[&path("source/device"), "c", "259", "300000"]);
    support::run("mkfifo", &[&path("source/fifo")]);
    support::run("chown", &["100000:200000", &path("source/fifo")]);
    support::run("ln", &[&path("source/etc/hostname"), &path("source/hard")]);
    for index in 0..2000 {
        std::fs::write(format!("{}/etc/many-{index}", path("source")), noise(index * 3, index as u64)).unwrap();
    }
    support::run("tar", &["--format=pax", "-C", &path("source"), "-cf", &path("layer.tar"), "."]);
    convert_blob(std::fs::File::open(path("layer.tar")).unwrap(), Path::new(&path("layer.erofs")), &Limits::default())
        .unwrap();
    fsck(Path::new(&path("layer.erofs")));
    support::run("mount", &["-t", "erofs", "-o", "loop,ro", &path("layer.erofs"), &path("mount")]);
    let compared = std::process::Command::new("tar")
        .args(["--compare", "-f", &path("layer.tar"), "-C", &path("mount")])
        .output()
        .unwrap();
    let links = std::fs::metadata(path("mount/hard")).map(|metadata| std::os::unix::fs::MetadataExt::nlink(&metadata));
    support::run("umount", &[&path("mount")]);
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
    assert_eq!(links.unwrap(), 2);
}
