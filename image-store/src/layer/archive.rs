//! The tar stream of a layer, entry by entry. This is where a tar header is trusted, and how far.
//!
//! The formats are V7, ustar, GNU and PAX (POSIX.1-2008, pax "ustar Interchange Format" and "pax Extended Header"), with
//! both kinds of sparse files. What the `tar` crate would keep in memory without a bound (long names, PAX records) is
//! bounded here, so of that crate only the header's fields are used. Where writers differ, Go's archive/tar, by which
//! images are made, decides: link, device and directory entries have no data, global PAX headers change nothing.

mod pax;
mod sparse;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::ops::Range;

use tar::{EntryType, Header};

use self::pax::Records;
use self::sparse::SparseMap;
use super::LayerError;

const BLOCK: usize = 512;
/// Where the numbers are in a header.
const MODE_FIELD: Range<usize> = 100..108;
const UID_FIELD: Range<usize> = 108..116;
const GID_FIELD: Range<usize> = 116..124;
const SIZE_FIELD: Range<usize> = 124..136;
const MTIME_FIELD: Range<usize> = 136..148;
const MAJOR_FIELD: Range<usize> = 329..337;
const MINOR_FIELD: Range<usize> = 337..345;
/// Most bytes of a long name or of the PAX records before an entry.
const MAX_EXTENSION: u64 = 1 << 20;

/// One entry, without its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TarEntry {
    pub path: Vec<u8>,
    pub kind: TarKind,
    /// Permission bits, with set-uid, set-gid and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    pub mtime_nanos: u32,
    /// By full name, such as `user.mime_type`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TarKind {
    /// With its size in bytes, holes included.
    File(u64),
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// Reads a tar stream.
pub(crate) struct TarReader<R> {
    input: R,
    /// Bytes taken from `input`.
    offset: u64,
    data: EntryData,
}

/// What is left of the current entry's data.
#[derive(Default)]
struct EntryData {
    /// Bytes that are still in the stream, and the padding after them.
    stored: u64,
    padding: u64,
    /// Where the next byte stands in the file, and the file's size.
    position: u64,
    size: u64,
    /// Which parts of the file are in the stream; `None`: all.
    sparse: Option<SparseMap>,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, offset: 0, data: EntryData::default() }
    }

    /// The source of the stream.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    /// The next entry; data of the one before that were not read are skipped.
    pub(crate) fn next(&mut self) -> Result<Option<TarEntry>, LayerError> {
        let rest = self.data.stored + self.data.padding;
        self.data = EntryData::default();
        self.skip(rest)?;
        let mut long_name = None;
        let mut long_link = None;
        let mut records = Records::default();
        loop {
            let Some(header) = self.header()? else {
                if long_name.is_some() || long_link.is_some() || !records.is_empty() {
                    return Err(self.malformed("an extension header with no entry after it"));
                }
                return Ok(None);
            };
            let size = number(&header, SIZE_FIELD, header.entry_size());
            let size = size.ok_or_else(|| self.malformed("a size that is no number"))?;
            match header.entry_type() {
                EntryType::GNULongName => long_name = Some(until_nul(self.extension(size)?)),
                EntryType::GNULongLink => long_link = Some(until_nul(self.extension(size)?)),
                EntryType::XHeader => {
                    let bytes = self.extension(size)?;
                    records = Records::parse(&bytes).map_err(|problem| self.malformed(problem))?;
                }
                EntryType::XGlobalHeader => drop(self.extension(size)?),
                _ => return self.entry(&header, size, long_name, long_link, records).map(Some),
            }
        }
    }

    /// Reads data of the current entry, holes as zeros. 0 is their end.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let left = self.data.size - self.data.position;
        let mut length = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        if length == 0 {
            return Ok(0);
        }
        let mut hole = false;
        if let Some(sparse) = &mut self.data.sparse {
            let run = sparse.run_at(self.data.position, self.data.size);
            hole = run.hole;
            length = usize::try_from(run.length).unwrap_or(usize::MAX).min(length);
        }
        if hole {
            buffer[..length].fill(0);
        } else {
            length = match self.input.read(&mut buffer[..length]) {
                Ok(0) => return Err(self.malformed("the stream ends within a file's data")),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return self.read_data(buffer),
                Err(source) => return Err(LayerError::Input { source }),
            };
            self.offset += length as u64;
            self.data.stored -= length as u64;
        }
        self.data.position += length as u64;
        Ok(length)
    }

    /// The next header; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, LayerError> {
        let mut header = Header::new_old();
        if !self.block(header.as_mut_bytes())? {
            return Ok(None);
        }
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            let mut second = [0; BLOCK];
            return match self.block(&mut second)? && second.iter().any(|byte| *byte != 0) {
                true => Err(self.malformed("data after a block of zeros")),
                false => Ok(None),
            };
        }
        let bytes = header.as_bytes();
        let blanked = |index: usize| (148..156).contains(&index);
        let sum: u32 = bytes.iter().enumerate().map(|(i, b)| u32::from(if blanked(i) { b' ' } else { *b })).sum();
        if header.cksum().ok() != Some(sum) {
            return Err(self.malformed("a header with a wrong checksum"));
        }
        Ok(Some(header))
    }

    /// The entry that `header` and what stood before it describe.
    fn entry(
        &mut self,
        header: &Header,
        size: u64,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        mut records: Records,
    ) -> Result<TarEntry, LayerError> {
        let path = records.path.take().or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = records.link.take().or(long_link);
        let link = link.unwrap_or_else(|| header.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default());
        let device = |this: &Self| -> Result<(u32, u32), LayerError> {
            let major = number(header, MAJOR_FIELD, header.device_major().map(Option::unwrap_or_default));
            let minor = number(header, MINOR_FIELD, header.device_minor().map(Option::unwrap_or_default));
            major.zip(minor).ok_or_else(|| this.malformed("a device number that is no number"))
        };
        let kind = match header.entry_type() {
            EntryType::Regular if header.as_ustar().is_none() && header.as_gnu().is_none() && path.ends_with(b"/") => {
                TarKind::Directory
            }
            EntryType::Regular | EntryType::Continuous => {
                let stored = records.size.unwrap_or(size);
                TarKind::File(self.begin_data(stored, &mut records)?)
            }
            EntryType::GNUSparse => TarKind::File(self.begin_gnu_sparse(header, records.size.unwrap_or(size))?),
            EntryType::Directory => TarKind::Directory,
            EntryType::Symlink => TarKind::Symlink(link),
            EntryType::Link => TarKind::HardLink(link),
            EntryType::Char => device(self).map(|(major, minor)| TarKind::CharDevice(major, minor))?,
            EntryType::Block => device(self).map(|(major, minor)| TarKind::BlockDevice(major, minor))?,
            EntryType::Fifo => TarKind::Fifo,
            other => {
                let problem = format!("is of type {:?}, which is not supported", char::from(other.as_byte()));
                return Err(LayerError::entry(&path, problem));
            }
        };
        let id = |value: Option<u64>, field: Option<u64>, what: &'static str| -> Result<u32, LayerError> {
            let value = value.or(field);
            value.and_then(|id| u32::try_from(id).ok()).ok_or_else(|| LayerError::entry(&path, what.to_owned()))
        };
        let uid = id(records.uid, number(header, UID_FIELD, header.uid()), "has no valid user id")?;
        let gid = id(records.gid, number(header, GID_FIELD, header.gid()), "has no valid group id")?;
        let mode = number(header, MODE_FIELD, header.mode());
        let mode = mode.ok_or_else(|| self.malformed("a mode that is no number"))?;
        let (mtime, mtime_nanos) = match records.mtime {
            Some(mtime) => mtime,
            // Negative times in base 256 come out above i64::MAX.
            None => {
                let mtime = number(header, MTIME_FIELD, header.mtime());
                (mtime.ok_or_else(|| self.malformed("a time that is no number"))?.cast_signed(), 0)
            }
        };
        let path = records.sparse.name.take().unwrap_or(path);
        Ok(TarEntry { path, kind, mode: (mode & 0o7777) as u16, uid, gid, mtime, mtime_nanos, xattrs: records.xattrs })
    }

    /// Prepares for a regular file's data, which may be sparse in one of PAX's three ways. Gives the file's size.
    fn begin_data(&mut self, stored: u64, records: &mut Records) -> Result<u64, LayerError> {
        self.data = EntryData::stored(stored);
        let size = if records.sparse.in_data {
            let map = self.sparse_map_in_data()?;
            let size = records.sparse.size.ok_or_else(|| self.malformed("a sparse file without its size"))?;
            self.sparse(map, size)?
        } else if let Some(map) = records.sparse.map.take() {
            let size = records.sparse.size.ok_or_else(|| self.malformed("a sparse file without its size"))?;
            self.sparse(map, size)?
        } else {
            stored
        };
        self.data.size = size;
        Ok(size)
    }

    /// The map of a PAX 1.0 sparse file: decimal numbers, a line each, before the data, padded to a block.
    fn sparse_map_in_data(&mut self) -> Result<Vec<(u64, u64)>, LayerError> {
        let mut parser = sparse::MapInData::default();
        loop {
            let mut block = [0; BLOCK];
            if self.data.stored < BLOCK as u64 || !self.block(&mut block)? {
                return Err(self.malformed("a sparse map that does not end"));
            }
            self.data.stored -= BLOCK as u64;
            if let Some(map) = parser.feed(&block).map_err(|problem| self.malformed(problem))? {
                return Ok(map);
            }
        }
    }

    /// Prepares for the data of a file in GNU's old sparse format, whose map is in its header and blocks after it.
    fn begin_gnu_sparse(&mut self, header: &Header, stored: u64) -> Result<u64, LayerError> {
        let gnu = header.as_gnu().ok_or_else(|| self.malformed("a sparse file in a header that is not GNU's"))?;
        let size = gnu.real_size().map_err(|_| self.malformed("a sparse file's size that is no number"))?;
        let mut map = Vec::new();
        let bad = "a sparse map that is no numbers";
        sparse::push_gnu(&mut map, &gnu.sparse).map_err(|()| self.malformed(bad))?;
        let mut extended = gnu.is_extended();
        while extended {
            let mut block = tar::GnuExtSparseHeader::new();
            if !self.block(block.as_mut_bytes())? || map.len() > sparse::MAX_SEGMENTS {
                return Err(self.malformed("a sparse map that does not end"));
            }
            sparse::push_gnu(&mut map, &block.sparse).map_err(|()| self.malformed(bad))?;
            extended = block.is_extended();
        }
        self.data = EntryData::stored(stored);
        self.data.size = self.sparse(map, size)?;
        Ok(size)
    }

    fn sparse(&mut self, map: Vec<(u64, u64)>, size: u64) -> Result<u64, LayerError> {
        let map = SparseMap::new(map, size, self.data.stored).map_err(|problem| self.malformed(problem))?;
        self.data.sparse = Some(map);
        Ok(size)
    }

    /// The data of an extension header.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        if size > MAX_EXTENSION {
            return Err(LayerError::Limit { what: "bytes of an entry's extension header", limit: MAX_EXTENSION });
        }
        // Bounded just above.
        let mut bytes = vec![0; size as usize];
        if !self.exactly(&mut bytes)? && size > 0 {
            return Err(self.malformed("the stream ends within an extension header"));
        }
        self.skip(padding(size))?;
        Ok(bytes)
    }

    /// Reads a whole block; false at the end of the stream.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, LayerError> {
        self.exactly(block)
    }

    /// Fills `buffer`; false if the stream has ended before its first byte.
    fn exactly(&mut self, buffer: &mut [u8]) -> Result<bool, LayerError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(self.malformed("the stream ends within a block")),
                Ok(length) => filled += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(LayerError::Input { source }),
            }
        }
        self.offset += filled as u64;
        Ok(true)
    }

    fn skip(&mut self, count: u64) -> Result<(), LayerError> {
        let skipped = io::copy(&mut (&mut self.input).take(count), &mut io::sink());
        let skipped = skipped.map_err(|source| LayerError::Input { source })?;
        self.offset += skipped;
        match skipped == count {
            true => Ok(()),
            false => Err(self.malformed("the stream ends within an entry")),
        }
    }

    fn malformed(&self, problem: &'static str) -> LayerError {
        LayerError::Tar { offset: self.offset, problem }
    }
}

impl EntryData {
    fn stored(stored: u64) -> Self {
        Self { stored, padding: padding(stored), ..Self::default() }
    }
}

/// A header's number: `parsed`, or 0 if its field is blank, as some writers leave those that mean nothing.
fn number<T: Default>(header: &Header, field: Range<usize>, parsed: io::Result<T>) -> Option<T> {
    let blank = header.as_bytes()[field].iter().all(|byte| matches!(byte, 0 | b' '));
    if blank { Some(T::default()) } else { parsed.ok() }
}

/// Bytes from the end of `size` bytes to the next block.
fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}
