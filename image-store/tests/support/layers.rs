//! Random layers: their tars, what they mean, and what an independent reader finds in an image.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;
use isopod_image_store::{Limits, convert_blob};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{append, have, noise};

const OPAQUE: &[u8] = b"trusted.overlay.opaque";
const IMPLIED: &[u8] = b"trusted.overlay.implied";

/// What a name in an image stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Dir,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// Paths, without the root, to nodes and the identity of each: equal for names of one file.
pub type Tree = BTreeMap<Vec<u8>, (Node, u64)>;

pub fn read_back(image: &[u8]) -> (Node, Tree) {
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

pub fn convert(tar: &[u8]) -> Vec<u8> {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("image.erofs");
    convert_blob(tar, &path, &Limits::default()).unwrap();
    let image = std::fs::read(&path).unwrap();
    fsck(&path);
    image
}

pub fn fsck(path: &Path) {
    if have("fsck.erofs") {
        super::run("fsck.erofs", &[path.to_str().unwrap()]);
    }
}

/// An entry of a random tar.
#[derive(Debug, Clone)]
pub struct Entry {
    pub path: String,
    pub node: Node,
    /// A hard link to the file made by the entry with this index, modulo their number.
    pub link: Option<usize>,
    pub whiteout: Whiteout,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Whiteout {
    None,
    File,
    Opaque,
}

pub fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = 3 + key.len() + value.len();
    let length = (1..).map(|digits| rest + digits).find(|length| length.to_string().len() == length - rest).unwrap();
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}

/// Writes an entry with everything that may not fit a ustar header in PAX records.
pub fn write_entry(tar: &mut Vec<u8>, path: &[u8], node: &Node, link: Option<&[u8]>) {
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

/// A directory of which nothing is said.
pub fn plain() -> Node {
    Node { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: BTreeMap::new(), kind: Kind::Dir }
}

/// One that only the names in it imply.
pub fn implied() -> Node {
    let mut node = plain();
    node.xattrs.insert(IMPLIED.to_vec(), b"y".to_vec());
    node
}

pub fn whiteout_node() -> Node {
    Node { mode: 0, uid: 0, gid: 0, mtime: (0, 0), xattrs: BTreeMap::new(), kind: Kind::Char(0, 0) }
}

pub fn set_opaque(node: &mut Node) {
    node.xattrs.insert(OPAQUE.to_vec(), b"y".to_vec());
}

/// Nothing of what lower layers have at its path is in it.
fn set_new(node: &mut Node) {
    set_opaque(node);
    node.xattrs.remove(IMPLIED);
}

/// A second, naive description of what a tar means: paths to nodes, with an identity for each file.
#[derive(Default)]
pub struct Model {
    pub tree: Tree,
    pub root: Option<Node>,
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
                    let mut node = implied();
                    if hidden.is_some() {
                        set_new(&mut node);
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
pub fn build(entries: &[Entry]) -> (Vec<u8>, Model) {
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
                    None => set_opaque(model.root.get_or_insert_with(implied)),
                }
            }
            (Whiteout::File, _) => {
                write_entry(&mut tar, join(&format!(".wh.{name}")).as_bytes(), &empty_file(), None);
                match existing {
                    None => model.put(path.as_bytes().to_vec(), whiteout_node()),
                    Some(_) if is_dir => set_new(&mut model.tree.get_mut(path.as_bytes()).unwrap().0),
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
                        let opaque = old.xattrs.contains_key(OPAQUE);
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

pub fn empty_file() -> Node {
    Node { kind: Kind::File(Vec::new()), ..plain() }
}

pub fn node_strategy() -> impl Strategy<Value = Node> {
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

pub fn entries_strategy() -> impl Strategy<Value = Vec<Entry>> {
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

/// As [`Tree`]; the identities are a layer's number and that in it.
pub type Stacked = BTreeMap<Vec<u8>, (Node, (usize, u64))>;

/// What the layers show one over the other, the root first: a second, naive description.
pub fn stack(layers: &[Model]) -> (Node, Stacked) {
    let mut tree = Stacked::new();
    let mut root = plain();
    for (number, layer) in layers.iter().enumerate() {
        let below = |path: &[u8]| [path, b"/"].concat();
        if let Some(new) = &layer.root {
            if new.xattrs.contains_key(OPAQUE) {
                tree.clear();
            }
            if !new.xattrs.contains_key(IMPLIED) {
                root = without_marks(new);
            }
        }
        for (path, (node, id)) in &layer.tree {
            let prefix = below(path);
            let lower = tree.get(path).map(|(node, _): &(Node, _)| node.kind == Kind::Dir);
            let directory = node.kind == Kind::Dir && lower == Some(true);
            if !directory || node.xattrs.contains_key(OPAQUE) {
                tree.retain(|path, _| !path.starts_with(&prefix));
            }
            if *node == whiteout_node() {
                tree.remove(path);
            } else if !directory || !node.xattrs.contains_key(IMPLIED) {
                tree.insert(path.clone(), (without_marks(node), (number, *id)));
            }
        }
    }
    (root, tree)
}

fn without_marks(node: &Node) -> Node {
    let mut node = node.clone();
    node.xattrs.retain(|name, _| name != OPAQUE && name != IMPLIED);
    node
}
