//! An archive's files, put aside so that they can be read in any order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;

use crate::config::Limits;
use crate::layer::{LayerError, TarKind, TarReader};

/// Most files and links of an archive.
const MAX_ENTRIES: usize = 100_000;
const BUFFER: usize = 256 << 10;
/// How many links may lead to each other.
const MAX_LINKS: usize = 8;

/// The regular files of an archive, by their names.
pub(crate) struct Archive {
    /// The contents of all files, one after the other.
    spool: File,
    files: HashMap<String, Span>,
    links: HashMap<String, String>,
}

#[derive(Clone, Copy)]
pub(crate) struct Span {
    offset: u64,
    pub length: u64,
}

impl Archive {
    /// Reads the archive to its end, into the empty file `spool`. The tar may be compressed.
    pub(crate) fn read(input: impl Read, spool: File, limits: &Limits) -> Result<Self, LayerError> {
        let (mut input, mut start) = (input, Vec::new());
        let first = (&mut input).take(4).read_to_end(&mut start);
        first.map_err(|source| LayerError::Input { source })?;
        let kind = start.clone();
        let input = BufReader::with_capacity(BUFFER, io::Cursor::new(start).chain(input));
        let input: Box<dyn Read> = match kind.as_slice() {
            [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            [0x28, 0xb5, 0x2f, 0xfd] => {
                let decoder = zstd::stream::read::Decoder::with_buffer(input);
                Box::new(decoder.map_err(|source| LayerError::Input { source })?)
            }
            _ => Box::new(input),
        };
        let mut archive = Self { spool, files: HashMap::new(), links: HashMap::new() };
        let end = archive.fill(TarReader::new(input), limits)?;
        // Whoever sends it wants to get rid of all of it; beyond its end is padding.
        io::copy(&mut end.take(64 << 20), &mut io::sink()).map_err(|source| LayerError::Input { source })?;
        Ok(archive)
    }

    fn fill<R: Read>(&mut self, mut tar: TarReader<R>, limits: &Limits) -> Result<R, LayerError> {
        let (mut offset, mut buffer) = (0, vec![0; BUFFER]);
        while let Some(entry) = tar.next()? {
            if self.files.len() + self.links.len() >= MAX_ENTRIES || entry.path.len() > limits.max_path_bytes {
                return Err(LayerError::Limit { what: "files or bytes of a name", limit: MAX_ENTRIES as u64 });
            }
            // A name that is not text is none of an image's.
            let Some(name) = std::str::from_utf8(&entry.path).ok().and_then(|path| resolve("", path)) else { continue };
            match entry.kind {
                TarKind::File(length) => {
                    if length > limits.max_archive_bytes.saturating_sub(offset) {
                        return Err(LayerError::Limit { what: "bytes in files", limit: limits.max_archive_bytes });
                    }
                    loop {
                        let read = tar.read_data(&mut buffer)?;
                        if read == 0 {
                            break;
                        }
                        self.spool.write_all(&buffer[..read]).map_err(|source| LayerError::Write { source })?;
                    }
                    self.files.insert(name, Span { offset, length });
                    offset += length;
                }
                // Old `docker save` has a layer that is in several images as a symbolic link to the first.
                TarKind::Symlink(target) => {
                    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                    let target = std::str::from_utf8(&target).ok().and_then(|target| resolve(directory, target));
                    self.links.extend(target.map(|target| (name, target)));
                }
                TarKind::HardLink(target) => {
                    let target = std::str::from_utf8(&target).ok().and_then(|target| resolve("", target));
                    self.links.extend(target.map(|target| (name, target)));
                }
                TarKind::Directory | TarKind::CharDevice(..) | TarKind::BlockDevice(..) | TarKind::Fifo => {}
            }
        }
        Ok(tar.into_inner())
    }

    /// Where the file is.
    pub(crate) fn find(&self, name: &str) -> Option<Span> {
        let mut name = resolve("", name)?;
        for _ in 0..MAX_LINKS {
            if let Some(span) = self.files.get(&name) {
                return Some(*span);
            }
            name.clone_from(self.links.get(&name)?);
        }
        None
    }

    /// Reads the file's next bytes from `position` on. 0 is its end.
    pub(crate) fn read_at(&self, span: Span, position: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(span.length.saturating_sub(position)).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        if length > 0 {
            self.spool.read_exact_at(&mut buffer[..length], span.offset + position)?;
        }
        Ok(length)
    }
}

/// The name that `path` has, seen from `directory`, without `.` and `..`; `None` if it leads out of the archive.
fn resolve(directory: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    let directory = if path.starts_with('/') { "" } else { directory };
    for part in directory.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_resolved_within_the_archive() {
        assert_eq!(resolve("", "./a//b").as_deref(), Some("a/b"));
        assert_eq!(resolve("a", "../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(resolve("a", "/b").as_deref(), Some("b"));
        assert_eq!(resolve("a", "../../b"), None);
    }
}
