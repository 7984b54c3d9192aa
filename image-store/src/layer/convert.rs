//! A layer's tar to EROFS, in one pass. This is where an entry's name is trusted, and how far.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

use super::LayerError;
use super::archive::{TarEntry, TarKind, TarReader};
use crate::config::Limits;
use crate::erofs::{ALIGNMENT, Attributes, Data, ErofsWriter, FileType, PathError, Tree, Written, Xattr, xattr_prefix};

/// Most bytes of a name in a directory, and of a symbolic link's target, in Linux.
const NAME_MAX: usize = 255;
const TARGET_MAX: usize = 4095;
/// Most bytes of extended attributes that an EROFS inode's count of them can say, with room for what we add.
const XATTR_MAX: usize = 64 << 10;

/// Prefixes of AUFS that OCI took for whiteouts (image-spec, layer.md "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A layer that was written.
#[derive(Debug)]
pub(super) struct Converted {
    /// The EROFS and its hashes, complete, but not all synced.
    pub file: File,
    /// Bytes of the EROFS, a multiple of 4096.
    pub size: u64,
    /// Entries of the tar.
    pub entries: u64,
}

/// Writes the EROFS of the tar in `input` to `file`, which is new and empty. `input` is read to its end, beyond the end of
/// the archive, so that a digest taken of it is that of the whole. Then `uuid` gives the file system's UUID.
pub(super) fn convert<R: Read>(
    input: R,
    file: File,
    limits: &Limits,
    uuid: impl FnOnce(R) -> Result<[u8; 16], LayerError>,
) -> Result<Converted, LayerError> {
    let mut conversion = Conversion {
        archive: TarReader::new(input),
        writer: ErofsWriter::new(file).map_err(|source| LayerError::Write { source })?,
        tree: Tree::new(),
        limits,
        entries: 0,
        metadata_bytes: 0,
        data_bytes: 0,
        buffer: vec![0; 256 << 10].into_boxed_slice(),
    };
    while let Some(entry) = conversion.archive.next()? {
        conversion.add(entry)?;
    }
    let Conversion { archive, writer, tree, entries, mut buffer, .. } = conversion;
    let mut input = archive.into_inner();
    while input.read(&mut buffer).map_err(|source| LayerError::Input { source })? > 0 {}
    let uuid = uuid(input)?;
    let write = |source| LayerError::Write { source };
    let Written { file, bytes, hashes } = writer.finish(&tree, uuid, Data::Own).map_err(write)?;
    file.write_all_at(&hashes, bytes.next_multiple_of(ALIGNMENT)).map_err(write)?;
    Ok(Converted { file, size: bytes, entries })
}

struct Conversion<'a, R> {
    archive: TarReader<R>,
    writer: ErofsWriter,
    tree: Tree,
    limits: &'a Limits,
    entries: u64,
    metadata_bytes: u64,
    data_bytes: u64,
    buffer: Box<[u8]>,
}

impl<R: Read> Conversion<'_, R> {
    fn add(&mut self, entry: TarEntry) -> Result<(), LayerError> {
        self.count(&entry)?;
        let path = components(&entry.path, self.limits).map_err(|problem| LayerError::entry(&entry.path, problem))?;
        if path.iter().any(|name| name.starts_with(WHITEOUT_META) && *name != OPAQUE) {
            tracing::debug!(path = %entry.path.escape_ascii(), "an entry of AUFS's own is left out");
            return Ok(());
        }
        let place = |result: Result<(), PathError>| result.map_err(|error| misplaced(&entry, error));
        if let Some((name, parent)) = path.split_last()
            && let Some(hidden) = name.strip_prefix(WHITEOUT)
        {
            return match hidden {
                b"" | b"." | b".." => Err(LayerError::entry(&entry.path, "is a whiteout of no name")),
                _ if *name == OPAQUE => place(self.tree.add_opaque(parent)),
                _ => place(self.tree.add_whiteout(&[parent, &[hidden]].concat())),
            };
        }
        let attributes = self.attributes(&entry)?;
        match &entry.kind {
            TarKind::File(size) => self.add_data(&entry, &path, attributes, *size)?,
            TarKind::Directory => place(self.tree.add_directory(&path, attributes))?,
            TarKind::HardLink(target) => {
                let target = components(target, self.limits).map_err(|problem| {
                    LayerError::entry(&entry.path, format!("is a hard link to {:?}, which {problem}", shown(target)))
                })?;
                place(self.tree.add_link(&path, &target))?;
            }
            TarKind::Symlink(target) => {
                if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) {
                    return Err(LayerError::entry(&entry.path, "is a symbolic link whose target is no path"));
                }
                self.add_file(&entry, &path, attributes, FileType::Symlink(target.as_slice().into()))?;
            }
            TarKind::CharDevice(major, minor) | TarKind::BlockDevice(major, minor) => {
                if *major >= 1 << 12 || *minor >= 1 << 20 {
                    let problem = format!("is a device with number {major}:{minor}, which Linux does not have");
                    return Err(LayerError::entry(&entry.path, problem));
                }
                let file = match entry.kind {
                    TarKind::CharDevice(..) => FileType::CharDevice(*major, *minor),
                    _ => FileType::BlockDevice(*major, *minor),
                };
                self.add_file(&entry, &path, attributes, file)?;
            }
            TarKind::Fifo => self.add_file(&entry, &path, attributes, FileType::Fifo)?,
        }
        let limit = self.limits.max_entries;
        match self.tree.len() as u64 > limit {
            true => Err(LayerError::Limit { what: "files and directories", limit }),
            false => Ok(()),
        }
    }

    /// Counts an entry and what of it stays in memory.
    fn count(&mut self, entry: &TarEntry) -> Result<(), LayerError> {
        self.entries += 1;
        if self.entries > self.limits.max_entries {
            return Err(LayerError::Limit { what: "entries", limit: self.limits.max_entries });
        }
        let target = match &entry.kind {
            TarKind::Symlink(target) | TarKind::HardLink(target) => target.len(),
            _ => 0,
        };
        let xattrs: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.metadata_bytes += (entry.path.len() + target + xattrs) as u64;
        match self.metadata_bytes > self.limits.max_metadata_bytes {
            true => Err(LayerError::Limit { what: "bytes of metadata", limit: self.limits.max_metadata_bytes }),
            false => Ok(()),
        }
    }

    fn add_file(
        &mut self,
        entry: &TarEntry,
        path: &[&[u8]],
        attributes: Attributes,
        file: FileType,
    ) -> Result<(), LayerError> {
        self.tree.add_file(path, attributes, file).map(drop).map_err(|error| misplaced(entry, error))
    }

    fn add_data(
        &mut self,
        entry: &TarEntry,
        path: &[&[u8]],
        attributes: Attributes,
        size: u64,
    ) -> Result<(), LayerError> {
        let limit = self.limits.max_layer_bytes;
        self.data_bytes = self.data_bytes.saturating_add(size);
        if self.data_bytes > limit {
            return Err(LayerError::Limit { what: "bytes of file data", limit });
        }
        let write = |source| LayerError::Write { source };
        let first_block = if size == 0 { 0 } else { self.writer.begin_data().map_err(write)? };
        let file = FileType::Regular { first_block, size };
        self.tree.add_file(path, attributes, file).map_err(|error| misplaced(entry, error))?;
        loop {
            let length = self.archive.read_data(&mut self.buffer)?;
            if length == 0 {
                break;
            }
            self.writer.write_data(&self.buffer[..length]).map_err(write)?;
        }
        self.writer.end_data().map_err(write)
    }

    fn attributes(&self, entry: &TarEntry) -> Result<Attributes, LayerError> {
        let mut xattrs = Vec::new();
        let mut bytes = 0;
        for (name, value) in &entry.xattrs {
            // overlayfs's marks, and ours, say what a directory hides or where a file's data are: a tar has whiteouts for that.
            if name.starts_with(b"trusted.overlay.") {
                continue;
            }
            let Some((index, rest)) = xattr_prefix(name) else {
                tracing::debug!(path = %entry.path.escape_ascii(), xattr = %name.escape_ascii(), "attribute left out");
                continue;
            };
            bytes += name.len() + value.len() + 8;
            if bytes > self.limits.max_xattr_bytes.min(XATTR_MAX) || value.len() > usize::from(u16::MAX) {
                return Err(LayerError::entry(&entry.path, "has too many bytes of extended attributes"));
            }
            xattrs.push(Xattr { index, name: rest.into(), value: value.as_slice().into() });
        }
        let TarEntry { mode, uid, gid, mtime, mtime_nanos, .. } = *entry;
        Ok(Attributes { mode, uid, gid, mtime, mtime_nanos, xattrs })
    }
}

/// The components of a name in a tar, which must lead to a place in the tree. None: the root itself.
fn components<'a>(path: &'a [u8], limits: &Limits) -> Result<Vec<&'a [u8]>, &'static str> {
    if path.len() > limits.max_path_bytes {
        return Err("has a name that is too long");
    }
    if path.is_empty() {
        return Err("has no name");
    }
    if path.contains(&0) {
        return Err("has a NUL byte in its name");
    }
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    // "/" alone is the root, as some builders name it.
    if path.starts_with(b"/") && !parts.is_empty() {
        return Err("has an absolute name");
    }
    if parts.contains(&&b".."[..]) {
        return Err("has \"..\" in its name");
    }
    if parts.iter().any(|part| part.len() > NAME_MAX) {
        return Err("has a name with a part longer than 255 bytes");
    }
    if parts.len() > limits.max_depth {
        return Err("is too deep in the tree");
    }
    Ok(parts)
}

fn misplaced(entry: &TarEntry, error: PathError) -> LayerError {
    let target = match &entry.kind {
        TarKind::HardLink(target) => shown(target),
        _ => String::new(),
    };
    let problem = match error {
        PathError::ParentNotDirectory => "is below something that is not a directory".to_owned(),
        PathError::NoTarget => format!("is a hard link to {target:?}, which is not in the layer"),
        PathError::TargetIsDirectory => format!("is a hard link to {target:?}, which is a directory"),
        PathError::Root => "is the root but not a directory".to_owned(),
    };
    LayerError::entry(&entry.path, problem)
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned()
}
