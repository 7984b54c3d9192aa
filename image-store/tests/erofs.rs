//! What is read back from an image against what the tar held: by an independent reader, by fsck.erofs, and by the kernel.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;
use isopod_image_store::{Limits, convert_blob};
use proptest::prelude::*;
use support::{append, have, noise};
use tempfile::TempDir;

/// What a name in an image stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Dir,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// Paths, without the root, to nodes and the identity of each: equal for names of one file.
type Tree = BTreeMap<Vec<u8>, (Node, u64)>;

fn read_back(image: &[u8]) -> (Node, Tree) {
    let fs = EroFS::new(SliceImage::new(image)).unwrap();
    let node = |inode: erofs_rs::types::Inode| {
        use std::os::unix::fs::PermissionsExt;
        let kind = if inode.is_dir() {
            Kind::Dir
        } else if inode.is_file() {
            let mut data = Vec::new();
            fs.open_inode_file(inode).unwrap().read_to_end(&mut data).unwrap();
            Kind::File(data)
        } else if inode.is_symlink() {
            Kind::Symlink(fs.read_link_inode(inode).unwrap().as_bytes().to_vec())
        } else {
            let file_type = format!("{:?}", inode.file_type());
            match inode.device() {
                Some((major, minor)) if file_type.contains("Char") => Kind::Char(major, minor),
                Some((major, minor)) => Kind::Block(major, minor),
                None => Kind::Fifo,
            }
        };
        Node {
            mode: inode.permissions().mode(),
            uid: inode.uid(),
            gid: inode.gid(),
            mtime: inode.modified_unix(),
            xattrs: fs.xattrs_inode(inode).unwrap(),
            kind,
        }
    };
    let mut tree = Tree::new();
    for entry in fs.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let path = entry.dir_entry.path().as_bytes().to_vec();
        let path = path.strip_prefix(b"/").unwrap_or(&path).to_vec();
        if !matches!(entry.dir_entry.file_name(), b"." | b"..") {
            tree.insert(path, (node(entry.inode), entry.dir_entry.nid()));
        }
    }
    let root = fs.get_inode(fs.super_block().root_inode_id()).unwrap();
    (node(root), tree)
}

fn convert(tar: &[u8]) -> Vec<u8> {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("image.erofs");
    convert_blob(tar, &path, &Limits::default()).unwrap();
    let image = std::fs::read(&path).unwrap();
    fsck(&path);
    image
}

fn fsck(path: &Path) {
    if have("fsck.erofs") {
        support::run("fsck.erofs", &[path.to_str().unwrap()]);
    }
}

/// An entry of a random tar.
#[derive(Debug, Clone)]
struct Entry {
    path: String,
    node: Node,
    /// A hard link to the file made by the entry with this index, modulo their number.
    link: Option<usize>,
    whiteout: Whiteout,
}

#[derive(Debug, Clone, PartialEq)]
enum Whiteout {
    None,
    File,
    Opaque,
}

fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = 3 + key.len() + value.len();
    let length = (1..).map(|digits| rest + digits).find(|length| length.to_string().len() == length - rest).unwrap();
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}

/// Writes an entry with everything that may not fit a ustar header in PAX records.
fn write_entry(tar: &mut Vec<u8>, path: &[u8], node: &Node, link: Option<&[u8]>) {
    let mut records = Vec::new();
    let (seconds, nanos) = node.mtime;
    records.extend(pax_record(b"mtime", format!("{seconds}.{nanos:09}").as_bytes()));
    records.extend(pax_record(b"path", path));
    records.extend(pax_record(b"uid", node.uid.to_string().as_bytes()));
    records.extend(pax_record(b"gid", node.gid.to_string().as_bytes()));
    for (name, value) in &node.xattrs {
        records.extend(pax_record(&[b"SCHILY.xattr.", &name[..]].concat(), value));
    }
    let mut header = tar::Header::new_ustar();
    header.set_mode(node.mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let mut data = &b""[..];
    let (kind, target) = match (&node.kind, link) {
        (_, Some(link)) => (tar::EntryType::Link, Some(link)),
        (Kind::Dir, _) => (tar::EntryType::Directory, None),
        (Kind::Symlink(target), _) => (tar::EntryType::Symlink, Some(&target[..])),
        (Kind::File(bytes), _) => {
            data = bytes;
            (tar::EntryType::Regular, None)
        }
        (Kind::Char(major, minor), _) => {
            header.set_device_major(*major).unwrap();
            header.set_device_minor(*minor).unwrap();
            (tar::EntryType::Char, None)
        }
        (Kind::Block(major, minor), _) => {
            header.set_device_major(*major).unwrap();
            header.set_device_minor(*minor).unwrap();
            (tar::EntryType::Block, None)
        }
        (Kind::Fifo, _) => (tar::EntryType::Fifo, None),
    };
    if let Some(target) = target {
        records.extend(pax_record(b"linkpath", target));
    }
    let mut extension = tar::Header::new_ustar();
    extension.set_entry_type(tar::EntryType::XHeader);
    extension.set_size(records.len() as u64);
    extension.set_cksum();
    append(tar, &extension, &records);
    header.set_entry_type(kind);
    header.set_size(data.len() as u64);
    header.set_cksum();
    append(tar, &header, data);
}

fn implicit() -> Node {
    Node { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: BTreeMap::new(), kind: Kind::Dir }
}

fn whiteout_node() -> Node {
    Node { mode: 0, uid: 0, gid: 0, mtime: (0, 0), xattrs: BTreeMap::new(), kind: Kind::Char(0, 0) }
}

fn set_opaque(node: &mut Node) {
    node.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
}

/// A second, naive description of what a tar means: paths to nodes, with an identity for each file.
#[derive(Default)]
struct Model {
    tree: Tree,
    root: Option<Node>,
    next: u64,
}

impl Model {
    /// Makes the directories above `path`; false if something else is in the way.
    fn parents(&mut self, path: &str) -> bool {
        let ends: Vec<usize> = path.match_indices('/').map(|(index, _)| index).collect();
        for end in &ends {
            match self.tree.get(&path.as_bytes()[..*end]) {
                Some((node, _)) if node.kind != Kind::Dir && *node != whiteout_node() => return false,
                _ => {}
            }
        }
        for end in ends {
            let key = path.as_bytes()[..end].to_vec();
            match self.tree.get(&key) {
                Some((node, _)) if node.kind == Kind::Dir => {}
                hidden => {
                    let mut node = implicit();
                    if hidden.is_some() {
                        set_opaque(&mut node);
                    }
                    self.put(key, node);
                }
            }
        }
        true
    }

    fn put(&mut self, path: Vec<u8>, node: Node) {
        self.next += 1;
        self.tree.insert(path, (node, self.next));
    }

    fn remove_below(&mut self, path: &str) {
        let prefix = format!("{path}/").into_bytes();
        self.tree.retain(|key, _| !key.starts_with(&prefix));
    }
}

/// Builds the tar of the entries that make sense, and what it should hold.
fn build(entries: &[Entry]) -> (Vec<u8>, Model) {
    let (mut tar, mut model) = (Vec::new(), Model::default());
    for entry in entries {
        let path = entry.path.as_str();
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
        let join = |name: &str| if parent.is_empty() { name.to_owned() } else { format!("{parent}/{name}") };
        let files: Vec<_> = model.tree.iter().filter(|(_, (node, _))| node.kind != Kind::Dir).collect();
        let link = entry.link.filter(|_| !files.is_empty()).map(|index| {
            let (path, (node, id)) = files[index % files.len()];
            (path.clone(), node.clone(), *id)
        });
        if !model.parents(path) {
            continue;
        }
        let existing = model.tree.get(path.as_bytes()).cloned();
        let is_dir = existing.as_ref().is_some_and(|(node, _)| node.kind == Kind::Dir);
        match (&entry.whiteout, link) {
            (Whiteout::Opaque, _) => {
                write_entry(&mut tar, join(".wh..wh..opq").as_bytes(), &empty_file(), None);
                match model.tree.get_mut(parent.as_bytes()) {
                    Some((node, _)) => set_opaque(node),
                    None => set_opaque(model.root.get_or_insert_with(implicit)),
                }
            }
            (Whiteout::File, _) => {
                write_entry(&mut tar, join(&format!(".wh.{name}")).as_bytes(), &empty_file(), None);
                match existing {
                    None => model.put(path.as_bytes().to_vec(), whiteout_node()),
                    Some(_) if is_dir => set_opaque(&mut model.tree.get_mut(path.as_bytes()).unwrap().0),
                    Some(_) => {}
                }
            }
            // The target is found before the name is taken; a target below the name goes with it.
            (Whiteout::None, Some((target, node, id))) => {
                write_entry(&mut tar, path.as_bytes(), &entry.node, Some(&target));
                model.remove_below(path);
                model.tree.insert(path.as_bytes().to_vec(), (node, id));
            }
            (Whiteout::None, None) => {
                write_entry(&mut tar, path.as_bytes(), &entry.node, None);
                let mut node = entry.node.clone();
                match (&existing, node.kind == Kind::Dir) {
                    (Some((old, _)), true) => {
                        let opaque = old.xattrs.contains_key(&b"trusted.overlay.opaque"[..]);
                        if opaque || *old == whiteout_node() {
                            set_opaque(&mut node);
                        }
                    }
                    _ => model.remove_below(path),
                }
                model.put(path.as_bytes().to_vec(), node);
            }
        }
    }
    tar.resize(tar.len() + 1024, 0);
    (tar, model)
}

fn empty_file() -> Node {
    Node { kind: Kind::File(Vec::new()), ..implicit() }
}

fn node_strategy() -> impl Strategy<Value = Node> {
    let kind = prop_oneof![
        3 => Just(Kind::Dir),
        4 => (prop_oneof![0..10usize, 4090..4100usize, 0..20_000usize], any::<u64>())
            .prop_map(|(length, seed)| Kind::File(noise(length, seed))),
        2 => prop_oneof!["[a-z./]{1,40}", (1000..4096usize).prop_map(|length| "t".repeat(length))]
            .prop_map(|target| Kind::Symlink(target.into_bytes())),
        1 => (1..4096u32, 0..0o7_777_777u32 & 0xf_ffff).prop_map(|(major, minor)| Kind::Char(major, minor)),
        1 => (0..4096u32, 0..256u32).prop_map(|(major, minor)| Kind::Block(major, minor)),
        1 => Just(Kind::Fifo),
    ];
    let id = prop_oneof![0..3u32, any::<u32>()];
    let name = prop_oneof![
        "user\\.[a-z]{1,20}",
        "trusted\\.[a-n]{1,8}",
        Just("security.capability".to_owned()),
        Just("system.posix_acl_access".to_owned()),
        "user\\.[a-z]{250}",
    ];
    let value = (prop_oneof![0..30usize, 3000..5000usize], any::<u64>()).prop_map(|(length, seed)| noise(length, seed));
    let xattrs = prop::collection::btree_map(name.prop_map(String::into_bytes), value, 0..3);
    let xattrs = prop_oneof![3 => Just(BTreeMap::new()), 1 => xattrs];
    (0..0o10_000u32, id.clone(), id, 0..9_000_000_000i64, 0..1_000_000_000u32, xattrs, kind).prop_map(
        |(mode, uid, gid, seconds, nanos, xattrs, kind)| Node { mode, uid, gid, mtime: (seconds, nanos), xattrs, kind },
    )
}

fn entries_strategy() -> impl Strategy<Value = Vec<Entry>> {
    // Few names, so that paths meet.
    let part = prop_oneof![8 => "[ab]", 2 => "[c-h!ä~-]{1,3}", 1 => "[x-z]{200,255}"];
    let path = prop::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"));
    let whiteout = prop_oneof![12 => Just(Whiteout::None), 1 => Just(Whiteout::File), 1 => Just(Whiteout::Opaque)];
    let link = prop_oneof![6 => Just(None), 1 => any::<usize>().prop_map(Some)];
    let entry = (path, node_strategy(), link, whiteout)
        .prop_filter("names longer than Linux takes", |(path, ..)| path.split('/').all(|part| part.len() <= 255))
        .prop_map(|(path, node, link, whiteout)| Entry { path, node, link, whiteout })
        .prop_filter("a whiteout's name has a prefix", |entry| {
            entry.whiteout == Whiteout::None || entry.path.rsplit('/').next().unwrap().len() < 250
        })
        .boxed();
    prop_oneof![4 => prop::collection::vec(entry.clone(), 0..40), 1 => prop::collection::vec(entry, 200..400)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn what_the_tar_held_is_read_back(entries in entries_strategy()) {
        let (tar, model) = build(&entries);
        let image = convert(&tar);
        prop_assert_eq!(&image, &convert(&tar), "the same tar gives the same bytes");
        let (root, tree) = read_back(&image);
        prop_assert_eq!(root, model.root.clone().unwrap_or_else(implicit));
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
