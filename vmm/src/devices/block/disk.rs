//! Parts of files as one disk.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::Errno;

use super::{BlockError, SECTOR};
use crate::devices::chain::Buffers;
use crate::devices::sys::{self, Pieces};
use crate::virtio::GuestMemory;

/// A part of a file: a run of a disk's sectors.
#[derive(Debug)]
pub struct Segment {
    /// A regular file or a block device, open for reading, and for writing unless the disk is read-only.
    pub file: File,
    /// Where in the file it begins, in bytes; a multiple of 512.
    pub offset: u64,
    /// Its bytes; a multiple of 512 and not 0.
    pub length: u64,
}

/// A checked list of segments.
#[derive(Debug)]
pub(super) struct Disk {
    segments: Vec<Segment>,
    /// Where on the disk each segment ends; ascending.
    ends: Vec<u64>,
}

/// What part of a request falls into one segment.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    /// Which segment.
    segment: usize,
    /// Position in the segment's file.
    position: u64,
    /// Bytes, at most those asked for.
    length: u64,
}

impl Disk {
    /// Checks that the segments are what a disk can be made of, and that the files are long enough.
    pub fn new(mut segments: Vec<Segment>) -> Result<Self, BlockError> {
        if segments.is_empty() {
            return Err(BlockError::NoSegment);
        }
        let mut ends = Vec::with_capacity(segments.len());
        let mut end = 0u64;
        for (index, Segment { file, offset, length }) in segments.iter_mut().enumerate() {
            let (offset, length) = (*offset, *length);
            if !offset.is_multiple_of(SECTOR) || !length.is_multiple_of(SECTOR) || length == 0 {
                return Err(BlockError::Unaligned { index, offset, length });
            }
            // Seeking finds the size of block devices too. Nothing uses the file position.
            let size = rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::End(0))
                .map_err(|errno| BlockError::Unreadable { index, source: errno.into() })?;
            if offset.checked_add(length).is_none_or(|needed| needed > size) {
                return Err(BlockError::FileTooShort { index, offset, length, size });
            }
            end = end.checked_add(length).filter(|end| *end <= i64::MAX as u64).ok_or(BlockError::DiskTooLong)?;
            ends.push(end);
        }
        Ok(Self { segments, ends })
    }

    /// Bytes on the disk.
    pub fn length(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// `true` if `length` bytes from `position` on are on the disk.
    pub fn contains(&self, position: u64, length: u64) -> bool {
        position.checked_add(length).is_some_and(|end| end <= self.length())
    }

    /// The first part of the bytes from `position` on; `None` past the end of the disk or of the bytes.
    fn part(&self, position: u64, length: u64) -> Option<Part> {
        let segment = self.ends.partition_point(|end| *end <= position);
        let end = *self.ends.get(segment)?;
        let Segment { offset, length: whole, .. } = &self.segments[segment];
        let start = end - whole;
        let length = length.min(end - position);
        (length > 0).then_some(Part { segment, position: offset + (position - start), length })
    }

    /// Fills `buffers` from `position` on. An end of the file that was not there when the disk was made is an error.
    pub fn read(&self, memory: &GuestMemory, buffers: &mut Buffers, position: u64) -> io::Result<()> {
        self.transfer(memory, buffers, position, |file, pieces, offset| sys::read_at(file.as_fd(), pieces, offset))
    }

    /// Writes `buffers` from `position` on.
    pub fn write(&self, memory: &GuestMemory, buffers: &mut Buffers, position: u64) -> io::Result<()> {
        self.transfer(memory, buffers, position, |file, pieces, offset| sys::write_at(file.as_fd(), pieces, offset))
    }

    fn transfer(
        &self,
        memory: &GuestMemory,
        buffers: &mut Buffers,
        mut position: u64,
        call: impl Fn(&File, &Pieces<'_>, u64) -> io::Result<usize>,
    ) -> io::Result<()> {
        while buffers.len() > 0 {
            let part = self.part(position, buffers.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
            // A part is at most as long as the buffers, whose length is a usize.
            let pieces = Pieces::new(memory, buffers, part.length as usize);
            match call(&self.segments[part.segment].file, &pieces, part.position) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    buffers.skip(count);
                    position += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes everything written durable.
    pub fn flush(&self) -> io::Result<()> {
        for Segment { file, .. } in &self.segments {
            fdatasync(file)?;
        }
        Ok(())
    }

    /// Gives the space of the bytes back, where the file system can. What is read there afterwards is unspecified.
    pub fn discard(&self, position: u64, length: u64) -> io::Result<()> {
        self.each_part(position, length, |file, position, length| match punch(file, position, length) {
            // It is a hint, which a file system need not be able to take.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        })
    }

    /// Makes the bytes read as zero; `unmap`: their space may be given back.
    pub fn write_zeroes(&self, position: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.each_part(position, length, |file, position, length| {
            let zero = |file| fallocate(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, position, length);
            let result = if unmap { punch(file, position, length) } else { zero(file) };
            match result {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeroes_plainly(file, position, length),
                other => Ok(other?),
            }
        })
    }

    fn each_part(
        &self,
        mut position: u64,
        mut length: u64,
        mut each: impl FnMut(&File, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        while length > 0 {
            let part = self.part(position, length).ok_or(io::ErrorKind::UnexpectedEof)?;
            each(&self.segments[part.segment].file, part.position, part.length)?;
            position += part.length;
            length -= part.length;
        }
        Ok(())
    }
}

fn punch(file: &File, position: u64, length: u64) -> Result<(), Errno> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, position, length)
}

fn write_zeroes_plainly(file: &File, mut position: u64, mut length: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    const ZEROES: [u8; 16 * 1024] = [0; 16 * 1024];
    while length > 0 {
        let now = length.min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..now as usize], position)?;
        position += now;
        length -= now;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
