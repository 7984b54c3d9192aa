//! One tree of the trees of several layers, as overlayfs would show them (OCI image-spec, layer.md "Applying Changesets").

use super::tree::{Content, Entries, FileType, Inode, InodeId, ROOT, Tree, WHITEOUT};

/// What all layers of a merged tree may at most have together, hidden files included, as those stay in memory too.
#[derive(Debug)]
pub(crate) struct MergeLimits {
    inodes: Budget,
    metadata_bytes: Budget,
}

/// What is above its limit, and the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMuch {
    pub what: &'static str,
    pub limit: u64,
}

#[derive(Debug)]
struct Budget {
    limit: TooMuch,
    left: u64,
}

impl Tree {
    /// An empty tree to merge layers into: it has none of their marks.
    pub(crate) fn merged() -> Self {
        let mut tree = Self::new();
        tree.inodes[ROOT.0].content = directory();
        tree
    }

    /// Puts `layer` over what is here. Its data's blocks are counted from block `base` of what this tree's are counted from.
    pub(crate) fn merge(&mut self, layer: Self, base: u32, left: &mut MergeLimits) -> Result<(), TooMuch> {
        let mut inodes: Vec<Option<Inode>> = layer.inodes.into_iter().map(Some).collect();
        // By inode number of the layer; for files, where they are here. What is gone from `inodes` and not here was a whiteout.
        let mut files: Vec<Option<InodeId>> = vec![None; inodes.len()];
        let Some(root) = inodes[ROOT.0].take() else { return Ok(()) };
        let mut open: Vec<(InodeId, Entries)> = Vec::new();
        open.extend(self.merge_directory(ROOT, true, root).map(|entries| (ROOT, entries)));
        while let Some((place, entries)) = open.pop() {
            for (name, id) in entries {
                left.metadata_bytes.take(name.len())?;
                let Some(inode) = inodes[id.0].take() else {
                    match files[id.0] {
                        Some(file) => drop(self.entries_mut(place).insert(name, file)),
                        None => drop(self.entries_mut(place).remove(&name)),
                    }
                    continue;
                };
                left.inode(&inode)?;
                match inode.content {
                    Content::File(WHITEOUT) => drop(self.entries_mut(place).remove(&name)),
                    Content::File(file) => {
                        let content = Content::File(shifted(file, base)?);
                        let file = self.push(Inode { attributes: inode.attributes, content });
                        files[id.0] = Some(file);
                        self.entries_mut(place).insert(name, file);
                    }
                    Content::Directory { .. } => {
                        let below = self.directory_at(place, &name);
                        let known = below.is_some();
                        let id = below.unwrap_or_else(|| {
                            let id = self.push(Inode { attributes: Default::default(), content: directory() });
                            self.entries_mut(place).insert(name, id);
                            id
                        });
                        open.extend(self.merge_directory(id, known, inode).map(|entries| (id, entries)));
                    }
                }
            }
        }
        Ok(())
    }

    /// Merges a directory of a layer, without what is in it, into `id`, which a lower layer has if it is `known`. Gives what is
    /// in it.
    fn merge_directory(&mut self, id: InodeId, known: bool, layer: Inode) -> Option<Entries> {
        let Content::Directory { entries, opaque, implied } = layer.content else { return None };
        if opaque {
            self.entries_mut(id).clear();
        }
        if !implied || !known {
            self.inodes[id.0].attributes = layer.attributes;
        }
        Some(entries)
    }

    fn directory_at(&mut self, parent: InodeId, name: &[u8]) -> Option<InodeId> {
        let id = self.entries_mut(parent).get(name).copied()?;
        matches!(self.inodes[id.0].content, Content::Directory { .. }).then_some(id)
    }
}

impl Budget {
    fn new(what: &'static str, limit: u64) -> Self {
        Self { limit: TooMuch { what, limit }, left: limit }
    }

    fn take(&mut self, amount: usize) -> Result<(), TooMuch> {
        self.left = self.left.checked_sub(amount as u64).ok_or(self.limit)?;
        Ok(())
    }
}

impl MergeLimits {
    /// At most so many files and directories, and bytes of names, targets and extended attributes.
    pub(crate) fn new(inodes: u64, metadata_bytes: u64) -> Self {
        let inodes = Budget::new("files and directories", inodes);
        Self { inodes, metadata_bytes: Budget::new("bytes of metadata", metadata_bytes) }
    }

    fn inode(&mut self, inode: &Inode) -> Result<(), TooMuch> {
        let xattrs: usize = inode.attributes.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
        let target = match &inode.content {
            Content::File(FileType::Symlink(target)) => target.len(),
            _ => 0,
        };
        self.metadata_bytes.take(xattrs + target)?;
        self.inodes.take(1)
    }
}

fn directory() -> Content {
    Content::Directory { entries: Entries::new(), opaque: false, implied: false }
}

/// A file of a layer whose blocks are counted from `base`.
fn shifted(file: FileType, base: u32) -> Result<FileType, TooMuch> {
    match file {
        FileType::Regular { first_block, size } if size > 0 => {
            let first_block =
                first_block.checked_add(base).ok_or(TooMuch { what: "blocks", limit: u64::from(u32::MAX) })?;
            Ok(FileType::Regular { first_block, size })
        }
        file => Ok(file),
    }
}
