//! Copying the kernel and the initramfs into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use isopod_proto::ErrorKind;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, GuestAddress, ReadVolatile, VolatileMemoryError, VolatileSlice};

use crate::virtio::GuestMemory;
use crate::{layout, memory};

const PAGE: u64 = 4096;
const CHUNK: usize = 64 * 1024;

/// An image that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Its descriptor cannot be read.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// Not an ELF file for x86-64.
    #[error("it is not an uncompressed x86-64 ELF kernel (vmlinux): it starts with {0:02x?}")]
    NotElf([u8; 4]),
    /// An ELF file, but not one that can be loaded.
    #[error("it is an ELF file, but not a kernel that fits into {memory} bytes of memory")]
    Elf {
        /// RAM below 4 GiB.
        memory: u64,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// Loads below the memory the boot protocol leaves to it.
    #[error("its entry point {0:#x} is not where a kernel is linked to")]
    Entry(u64),
    /// Nothing in it.
    #[error("it is empty")]
    Empty,
    /// No room beside the kernel.
    #[error(
        "its {length} bytes do not fit between the kernel's end at {kernel_end:#x} and the memory's end at {memory:#x}"
    )]
    NoRoom {
        /// Its size.
        length: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where RAM below 4 GiB ends.
        memory: u64,
    },
    /// Guest memory cannot be written.
    #[error("cannot copy it into guest memory")]
    Copy(#[source] vm_memory::GuestMemoryError),
}

impl ImageError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotElf(_) | Self::Elf { .. } | Self::Entry(_) | Self::Empty | Self::NoRoom { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::Read(_) | Self::Copy(_) => ErrorKind::Internal,
        }
    }
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Where to enter it in 64-bit mode.
    pub entry: GuestAddress,
    /// The first address after its memory image.
    pub end: u64,
}

/// Loads an ELF vmlinux to the addresses it is linked to.
pub fn load_kernel(memory: &GuestMemory, file: &File) -> Result<LoadedKernel, ImageError> {
    let mut magic = [0; 4];
    let read = file.read_at(&mut magic, 0).map_err(ImageError::Read)?;
    if read < magic.len() || magic != *b"\x7fELF" {
        return Err(ImageError::NotElf(magic));
    }
    let low_end = memory::low_end(memory);
    let mut reader = PositionedReader { file, position: 0 };
    let loaded =
        Elf::load(memory, None, &mut reader, None).map_err(|source| ImageError::Elf { memory: low_end, source })?;
    let entry = loaded.kernel_load;
    if entry.0 < layout::HIGH_RAM || entry.0 >= loaded.kernel_end || loaded.kernel_end > low_end {
        return Err(ImageError::Entry(entry.0));
    }
    Ok(LoadedKernel { entry, end: loaded.kernel_end })
}

/// Loads the initramfs at the end of the RAM below 4 GiB and returns where it is.
pub fn load_initramfs(memory: &GuestMemory, file: &File, kernel_end: u64) -> Result<Range<u64>, ImageError> {
    let length = file.metadata().map_err(ImageError::Read)?.len();
    let end = memory::low_end(memory);
    let start = end.checked_sub(length).map(|start| start & !(PAGE - 1)).filter(|start| *start >= kernel_end);
    let start = match start {
        _ if length == 0 => return Err(ImageError::Empty),
        None => return Err(ImageError::NoRoom { length, kernel_end, memory: end }),
        Some(start) => start,
    };
    let mut reader = PositionedReader { file, position: 0 };
    let length = usize::try_from(length).expect("it fits into the address space, as was just checked");
    memory.read_exact_volatile_from(GuestAddress(start), &mut reader, length).map_err(ImageError::Copy)?;
    Ok(start..start + length as u64)
}

/// Reads a file without moving its offset, which may be shared with the daemon and with other VMs.
struct PositionedReader<'a> {
    file: &'a File,
    position: u64,
}

impl Read for PositionedReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for PositionedReader<'_> {
    fn seek(&mut self, target: SeekFrom) -> io::Result<u64> {
        let position = match target {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(delta) => self.position.checked_add_signed(delta),
            SeekFrom::End(delta) => self.file.metadata()?.len().checked_add_signed(delta),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl ReadVolatile for PositionedReader<'_> {
    fn read_volatile<B: BitmapSlice>(&mut self, buffer: &mut VolatileSlice<B>) -> Result<usize, VolatileMemoryError> {
        // Through a buffer of our own: guest memory is no Rust slice that pread could be given safely. All of `buffer` is filled,
        // since guest memory takes a short read for the end.
        let mut chunk = vec![0; CHUNK];
        let mut filled = 0;
        while filled < buffer.len() {
            let wanted = (buffer.len() - filled).min(CHUNK);
            let read = match self.read(&mut chunk[..wanted]) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(VolatileMemoryError::IOError(error)),
            };
            buffer.offset(filled)?.copy_from(&chunk[..read]);
            filled += read;
        }
        Ok(filled)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(content).expect("room in it");
        file
    }

    #[test]
    fn a_file_that_is_no_elf_is_refused_as_such() {
        let memory = memory::allocate(64 << 20).expect("memory");
        for content in [&b""[..], b"\x7fE", b"MZ\0\0 a compressed kernel", &[0; 4096]] {
            let error = load_kernel(&memory, &file(content)).expect_err("not a kernel");
            assert!(matches!(error, ImageError::NotElf(_)), "{error}");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn an_elf_file_that_is_cut_off_is_refused() {
        let memory = memory::allocate(64 << 20).expect("memory");
        let error = load_kernel(&memory, &file(b"\x7fELF\x02\x01\x01")).expect_err("cut off");
        assert!(matches!(error, ImageError::Elf { .. }), "{error}");
    }

    #[test]
    fn the_initramfs_is_at_the_end_of_low_memory_and_the_file_offset_stays() {
        let memory = memory::allocate(64 << 20).expect("memory");
        let mut source = file(&[7; 150_000]);
        source.rewind().expect("seekable");
        let range = load_initramfs(&memory, &source, 0x100_0000).expect("it fits");
        assert_eq!(range, (64 << 20) - 151_552..(64 << 20) - 151_552 + 150_000);
        let mut last = [0; 2];
        memory.read_slice(&mut last, GuestAddress(range.end - 1)).expect("in memory");
        assert_eq!(last, [7, 0]);
        assert_eq!(source.stream_position().expect("seekable"), 0);
    }

    #[test]
    fn an_initramfs_that_would_overlap_the_kernel_is_refused() {
        let memory = memory::allocate(32 << 20).expect("memory");
        let error = load_initramfs(&memory, &file(&[1; 8192]), (32 << 20) - 4096).expect_err("no room");
        assert!(matches!(error, ImageError::NoRoom { length: 8192, .. }), "{error}");
        assert!(matches!(load_initramfs(&memory, &file(b""), 0).err(), Some(ImageError::Empty)));
    }
}
