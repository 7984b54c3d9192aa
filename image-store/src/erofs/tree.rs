//! The tree of a file system that is being made. Inodes live in one vector, so that nothing recurses.

use std::collections::BTreeMap;

use super::format::Xattr;

/// An inode of a [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InodeId(pub(super) usize);

/// What an inode has whatever its type.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Attributes {
    /// Permission bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nanos: u32,
    /// Together below 64 KiB.
    pub xattrs: Vec<Xattr>,
}

/// What an inode is, apart from directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FileType {
    /// Data in consecutive blocks.
    Regular {
        first_block: u32,
        size: u64,
    },
    /// At most 4095 bytes.
    Symlink(Box<[u8]>),
    /// Major and minor number: below 4096, and below 2^20.
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// A node of the tree.
#[derive(Debug)]
pub(super) struct Inode {
    pub attributes: Attributes,
    pub content: Content,
}

/// The names in a directory.
pub(super) type Entries = BTreeMap<Box<[u8]>, InodeId>;

#[derive(Debug)]
pub(super) enum Content {
    Directory {
        entries: Entries,
        /// Hides what lower layers have in it (`trusted.overlay.opaque`).
        opaque: bool,
        /// No entry is about it, only about what is in it: a lower layer's attributes stay ([`IMPLIED`]).
        implied: bool,
    },
    File(FileType),
}

/// Why something cannot be put at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PathError {
    /// One of the components before the last is there and not a directory.
    ParentNotDirectory,
    /// The target of a hard link is not there.
    NoTarget,
    /// The target of a hard link is a directory.
    TargetIsDirectory,
    /// Something other than a directory was to be the root.
    Root,
}

/// The tree of a file system that is being made.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(super) inodes: Vec<Inode>,
}

/// The root directory.
pub(super) const ROOT: InodeId = InodeId(0);

/// How a whiteout looks to overlayfs: a character device 0, 0.
pub(super) const WHITEOUT: FileType = FileType::CharDevice(0, 0);

/// The mark of a directory that hides what lower layers have in it: overlayfs's own.
pub(super) const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// The mark of a directory that no entry of its layer is about. Ours; a tar's attributes of this prefix are left out.
pub(super) const IMPLIED: &[u8] = b"trusted.overlay.implied";

impl Tree {
    pub(crate) fn new() -> Self {
        Self { inodes: vec![Inode::implicit_directory()] }
    }

    /// Makes the directory at `path`, or gives the one that is there `attributes`. Anything else there gives way.
    pub(crate) fn add_directory(&mut self, path: &[&[u8]], attributes: Attributes) -> Result<(), PathError> {
        let id = match path.split_last() {
            None => ROOT,
            Some((name, parent)) => {
                let parent = self.parent(parent)?;
                self.child_directory(parent, name, true)?
            }
        };
        self.inodes[id.0].attributes = attributes;
        if let Content::Directory { implied, .. } = &mut self.inodes[id.0].content {
            *implied = false;
        }
        Ok(())
    }

    /// Number of inodes made so far.
    pub(crate) fn len(&self) -> usize {
        self.inodes.len()
    }

    /// Puts a file at `path`, in place of whatever is there.
    pub(crate) fn add_file(
        &mut self,
        path: &[&[u8]],
        attributes: Attributes,
        file: FileType,
    ) -> Result<InodeId, PathError> {
        let (name, parent) = path.split_last().ok_or(PathError::Root)?;
        let parent = self.parent(parent)?;
        let id = self.push(Inode { attributes, content: Content::File(file) });
        self.entries_mut(parent).insert((*name).into(), id);
        Ok(id)
    }

    /// Gives the file at `target` the further name `path`.
    pub(crate) fn add_link(&mut self, path: &[&[u8]], target: &[&[u8]]) -> Result<(), PathError> {
        let (name, parent) = path.split_last().ok_or(PathError::Root)?;
        let id = self.lookup(target).ok_or(PathError::NoTarget)?;
        if matches!(self.inodes[id.0].content, Content::Directory { .. }) {
            return Err(PathError::TargetIsDirectory);
        }
        let parent = self.parent(parent)?;
        self.entries_mut(parent).insert((*name).into(), id);
        Ok(())
    }

    /// Hides what lower layers have at `path`. What this layer itself has there stays (OCI image-spec, layer.md
    /// "Whiteouts": they apply to lower layers only).
    pub(crate) fn add_whiteout(&mut self, path: &[&[u8]]) -> Result<(), PathError> {
        match self.lookup(path) {
            None => {
                let id = self.add_file(path, Attributes::default(), WHITEOUT)?;
                // Not a device of the image: overlayfs looks at the type alone.
                self.inodes[id.0].attributes.mode = 0;
            }
            Some(id) => self.make_new(id),
        }
        Ok(())
    }

    /// Hides what lower layers have in the directory at `path`, whose attributes stay theirs unless an entry is about it.
    pub(crate) fn add_opaque(&mut self, path: &[&[u8]]) -> Result<(), PathError> {
        let id = self.parent(path)?;
        if let Content::Directory { opaque, .. } = &mut self.inodes[id.0].content {
            *opaque = true;
        }
        Ok(())
    }

    fn lookup(&self, path: &[&[u8]]) -> Option<InodeId> {
        path.iter().try_fold(ROOT, |id, name| match &self.inodes[id.0].content {
            Content::Directory { entries, .. } => entries.get(*name).copied(),
            Content::File(_) => None,
        })
    }

    /// The directory at `path`; what is missing is made, with 0755 for whom no entry says otherwise. A whiteout gives way
    /// to a directory that hides as much.
    fn parent(&mut self, path: &[&[u8]]) -> Result<InodeId, PathError> {
        let mut id = ROOT;
        for name in path {
            id = self.child_directory(id, name, false)?;
        }
        Ok(id)
    }

    /// The directory `name` in `parent`, made if it is not there, or if it is a whiteout, or, if `replace`, any file.
    fn child_directory(&mut self, parent: InodeId, name: &[u8], replace: bool) -> Result<InodeId, PathError> {
        let existing = self.entries_mut(parent).get(name).copied();
        let mut hidden = false;
        if let Some(id) = existing {
            match &self.inodes[id.0].content {
                Content::Directory { .. } => return Ok(id),
                Content::File(WHITEOUT) => hidden = true,
                Content::File(_) if replace => {}
                Content::File(_) => return Err(PathError::ParentNotDirectory),
            }
        }
        let id = self.push(Inode::implicit_directory());
        if hidden {
            self.make_new(id);
        }
        self.entries_mut(parent).insert(name.into(), id);
        Ok(id)
    }

    /// Makes a directory one that has nothing of what lower layers have at its path.
    fn make_new(&mut self, id: InodeId) {
        if let Content::Directory { opaque, implied, .. } = &mut self.inodes[id.0].content {
            (*opaque, *implied) = (true, false);
        }
    }

    pub(super) fn push(&mut self, inode: Inode) -> InodeId {
        self.inodes.push(inode);
        InodeId(self.inodes.len() - 1)
    }

    pub(super) fn entries_mut(&mut self, id: InodeId) -> &mut Entries {
        match &mut self.inodes[id.0].content {
            Content::Directory { entries, .. } => entries,
            Content::File(_) => unreachable!("only ids of directories come here"),
        }
    }
}

impl Inode {
    fn implicit_directory() -> Self {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        let content = Content::Directory { entries: Entries::new(), opaque: false, implied: true };
        Self { attributes, content }
    }

    /// The attributes that are written: the entry's own, and a directory's marks.
    pub(super) fn xattrs(&self) -> Vec<Xattr> {
        let mut xattrs = self.attributes.xattrs.clone();
        if let Content::Directory { opaque, implied, .. } = self.content {
            for mark in [opaque.then_some(OPAQUE), implied.then_some(IMPLIED)].into_iter().flatten() {
                let (index, name) = super::xattr_prefix(mark).expect("trusted. is a known prefix");
                xattrs.push(Xattr { index, name: name.into(), value: b"y"[..].into() });
            }
        }
        xattrs
    }
}

impl FileType {
    /// The type bits of `st_mode`.
    pub(super) fn mode_bits(&self) -> u16 {
        match self {
            Self::Regular { .. } => 0o100_000,
            Self::Symlink(_) => 0o120_000,
            Self::CharDevice(..) => 0o020_000,
            Self::BlockDevice(..) => 0o060_000,
            Self::Fifo => 0o010_000,
        }
    }

    /// The type in a directory entry (`enum` EROFS_FT_*).
    pub(super) fn dirent_type(&self) -> u8 {
        match self {
            Self::Regular { .. } => 1,
            Self::CharDevice(..) => 3,
            Self::BlockDevice(..) => 4,
            Self::Fifo => 5,
            Self::Symlink(_) => 7,
        }
    }

    /// A device's number as EROFS stores it: the kernel's `new_encode_dev`.
    pub(super) fn device_number(&self) -> u32 {
        match self {
            Self::CharDevice(major, minor) | Self::BlockDevice(major, minor) => {
                (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
            }
            Self::Regular { .. } | Self::Symlink(_) | Self::Fifo => 0,
        }
    }
}
