//! What a mirror is to show, checked.

use std::collections::{BTreeMap, btree_map};

use isopod_proto::agent::{MirrorEntry, mirror_entry};
use isopod_proto::{MAX_MIRROR_BYTES, MAX_MIRROR_DEPTH, MAX_MIRROR_ENTRIES};

use crate::error::{Error, Result};

/// Longest name of a file (NAME_MAX).
const MAX_NAME: usize = 255;
/// Longest target of a symbolic link (PATH_MAX with its NUL).
const MAX_TARGET: usize = 4095;

/// Whom something belongs to and who may do what with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Permission bits.
    pub mode: u32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Something that has a name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A directory.
    Directory(Tree),
    /// A regular file and its contents.
    File(Owner, Vec<u8>),
    /// A symbolic link and its target. It has no mode of its own.
    Symlink(Owner, Vec<u8>),
}

/// A directory with all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The directory's own.
    pub owner: Owner,
    /// What is in it, by names that are one component each.
    pub entries: BTreeMap<Vec<u8>, Entry>,
}

impl Tree {
    /// The tree whose root the daemon has sent, if it is within the bounds of mirrors.
    pub fn check(root: MirrorEntry) -> Result<Self> {
        let mut left = Left { bytes: MAX_MIRROR_BYTES, entries: MAX_MIRROR_ENTRIES };
        match left.entry(root, 0)? {
            Entry::Directory(tree) => Ok(tree),
            Entry::File(..) | Entry::Symlink(..) => Err(Error::invalid("a mirror's root is not a directory")),
        }
    }
}

/// What may still come.
struct Left {
    bytes: usize,
    entries: usize,
}

impl Left {
    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let left = self.bytes.checked_sub(bytes.len());
        self.bytes = left.ok_or_else(|| Error::invalid(format!("a mirror has more than {MAX_MIRROR_BYTES} bytes")))?;
        Ok(())
    }

    fn entry(&mut self, entry: MirrorEntry, depth: usize) -> Result<Entry> {
        let MirrorEntry { name: _, mode, uid, gid, kind } = entry;
        if mode > 0o7777 || uid == u32::MAX || gid == u32::MAX {
            return Err(Error::invalid(format!("a mirror has an entry of mode {mode:o}, owner {uid}:{gid}")));
        }
        let owner = Owner { mode, uid, gid };
        match kind {
            Some(mirror_entry::Kind::Directory(directory)) => {
                Ok(Entry::Directory(Tree { owner, entries: self.entries(directory.entries, depth)? }))
            }
            Some(mirror_entry::Kind::File(contents)) => {
                self.take(&contents)?;
                Ok(Entry::File(owner, contents))
            }
            Some(mirror_entry::Kind::Symlink(target)) => {
                self.take(&target)?;
                if !(1..=MAX_TARGET).contains(&target.len()) || target.contains(&0) {
                    return Err(Error::invalid("a mirror has a symbolic link with a target that is no path"));
                }
                Ok(Entry::Symlink(owner, target))
            }
            None => Err(Error::invalid("a mirror has an entry of no kind")),
        }
    }

    fn entries(&mut self, listed: Vec<MirrorEntry>, depth: usize) -> Result<BTreeMap<Vec<u8>, Entry>> {
        if depth > MAX_MIRROR_DEPTH {
            return Err(Error::invalid(format!("a mirror is more than {MAX_MIRROR_DEPTH} directories deep")));
        }
        let mut entries = BTreeMap::new();
        for mut entry in listed {
            let left = self.entries.checked_sub(1);
            let text = || Error::invalid(format!("a mirror has more than {MAX_MIRROR_ENTRIES} entries"));
            self.entries = left.ok_or_else(text)?;
            let name = std::mem::take(&mut entry.name);
            self.take(&name)?;
            let plain = |byte: &u8| *byte != 0 && *byte != b'/';
            if !(1..=MAX_NAME).contains(&name.len()) || name == b"." || name == b".." || !name.iter().all(plain) {
                return Err(Error::invalid(format!("a mirror has an entry {:?}", String::from_utf8_lossy(&name))));
            }
            match entries.entry(name) {
                btree_map::Entry::Vacant(place) => place.insert(self.entry(entry, depth + 1)?),
                btree_map::Entry::Occupied(taken) => {
                    let name = String::from_utf8_lossy(taken.key());
                    return Err(Error::invalid(format!("a mirror has two entries {name:?} in one directory")));
                }
            };
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use isopod_proto::agent::MirrorDirectory;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn named(name: &[u8], kind: mirror_entry::Kind) -> MirrorEntry {
        MirrorEntry { name: name.into(), mode: 0o755, uid: 0, gid: 0, kind: Some(kind) }
    }

    fn directory(name: &[u8], entries: Vec<MirrorEntry>) -> MirrorEntry {
        named(name, mirror_entry::Kind::Directory(MirrorDirectory { entries }))
    }

    fn file(name: &[u8], bytes: usize) -> MirrorEntry {
        named(name, mirror_entry::Kind::File(vec![b'x'; bytes]))
    }

    fn refused(root: MirrorEntry) {
        assert_eq!(Tree::check(root).unwrap_err().kind(), isopod_proto::ErrorKind::InvalidArgument);
    }

    #[test]
    fn names_that_are_no_component_are_refused() {
        for bad in [b"".as_slice(), b".", b"..", b"a/b", b"/", b"nul\0", &[b'a'; 256]] {
            refused(directory(b"", vec![file(bad, 0)]));
        }
        refused(directory(b"", vec![file(b"twice", 0), file(b"twice", 1)]));
        assert!(Tree::check(directory(b"", vec![file(b"..data", 0), file(b"...", 0)])).is_ok());
    }

    #[test]
    fn bounds_are_kept() {
        let deep = |depth| (0..depth).fold(directory(b"d", vec![]), |tree, _| directory(b"d", vec![tree]));
        assert!(Tree::check(deep(MAX_MIRROR_DEPTH)).is_ok());
        refused(deep(MAX_MIRROR_DEPTH + 1));
        let wide = |count| (0..count).map(|n| file(n.to_string().as_bytes(), 0)).collect();
        assert!(Tree::check(directory(b"", wide(MAX_MIRROR_ENTRIES))).is_ok());
        refused(directory(b"", wide(MAX_MIRROR_ENTRIES + 1)));
        assert!(Tree::check(directory(b"", vec![file(b"f", MAX_MIRROR_BYTES - 1)])).is_ok());
        refused(directory(b"", vec![file(b"f", MAX_MIRROR_BYTES)]));
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        refused(file(b"", 0));
        refused(directory(b"", vec![MirrorEntry { name: b"a".to_vec(), ..MirrorEntry::default() }]));
        refused(directory(b"", vec![MirrorEntry { mode: 0o10000, ..file(b"f", 0) }]));
        refused(directory(b"", vec![MirrorEntry { uid: u32::MAX, ..file(b"f", 0) }]));
        for bad in [b"".as_slice(), b"a\0", &[b'a'; 4096]] {
            refused(directory(b"", vec![named(b"l", mirror_entry::Kind::Symlink(bad.into()))]));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(root) = MirrorEntry::decode(bytes.as_slice()) {
                let _ = Tree::check(root); // It ends, which is all that is asked of it.
            }
        }
    }
}
