//! Requests of the block device (virtio 1.2, section 5.2.6), each a chain: a header, data, and a status byte at the end.

use std::io;

use isopod_proto::DiskId;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::Bytes;

use super::SECTOR;
use super::disk::Disk;
use crate::devices::chain::{Buffers, Chain};
use crate::virtio::GuestMemory;

/// Most ranges of one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 16;
/// Most sectors of one range to discard: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one range to zero: 16 MiB, as they may have to be written.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 15;

/// The outcome of a request that was not served.
#[derive(Debug)]
enum Failure {
    /// The device does not do that.
    Unsupported,
    /// The request is malformed, goes past the end, writes to a read-only disk, or the host failed.
    Io,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        // The guest is told by the status. The host's kernel tells the operator of a failing disk.
        Self::Io
    }
}

/// What requests are served from.
pub(super) struct Target {
    pub disk: Disk,
    pub id: DiskId,
    pub readonly: bool,
}

/// Which range a discard or write-zeroes request names (5.2.6, struct virtio_blk_discard_write_zeroes).
#[derive(Debug, Clone, Copy)]
struct SectorRange {
    position: u64,
    length: u64,
    unmap: bool,
}

impl Target {
    /// Serves the request in `chain` and returns how many bytes were written into it.
    pub fn serve(&self, chain: &mut Chain, memory: &GuestMemory) -> u32 {
        // Without a place for the status there is nobody to tell.
        let Some(status) = chain.writable.take_last_byte() else { return 0 };
        let space = chain.writable.len();
        let (code, written) = match self.execute(chain, memory) {
            Ok(()) => (VIRTIO_BLK_S_OK, space - chain.writable.len()),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
        };
        // The chain was validated, so that the byte is in memory.
        let _ = memory.write_obj(code as u8, status);
        u32::try_from(written + 1).unwrap_or(u32::MAX)
    }

    fn execute(&self, chain: &mut Chain, memory: &GuestMemory) -> Result<(), Failure> {
        let mut header = [0; 16];
        chain.readable.read(memory, &mut header).ok_or(Failure::Io)?;
        let (kind, rest) = header.split_first_chunk::<4>().expect("16 bytes");
        let (_reserved, sector) = rest.split_last_chunk::<8>().expect("12 bytes");
        let sector = u64::from_le_bytes(*sector);
        match u32::from_le_bytes(*kind) {
            VIRTIO_BLK_T_IN => {
                let position = self.position(sector, &chain.writable)?;
                Ok(self.disk.read(memory, &mut chain.writable, position)?)
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let position = self.position(sector, &chain.readable)?;
                Ok(self.disk.write(memory, &mut chain.readable, position)?)
            }
            VIRTIO_BLK_T_FLUSH if self.readonly => Ok(()),
            VIRTIO_BLK_T_FLUSH => Ok(self.disk.flush()?),
            VIRTIO_BLK_T_GET_ID => {
                let mut serial = [0; DiskId::MAX];
                serial[..self.id.as_str().len()].copy_from_slice(self.id.as_str().as_bytes());
                let length = chain.writable.len().min(serial.len());
                chain.writable.write(memory, &serial[..length]).ok_or(Failure::Io)
            }
            VIRTIO_BLK_T_DISCARD => {
                self.check_writable()?;
                self.each_range(
                    &mut chain.readable,
                    memory,
                    MAX_DISCARD_SECTORS,
                    |range| {
                        // 5.2.6.2: the unmap flag is for write-zeroes only.
                        if range.unmap { Err(Failure::Unsupported) } else { Ok(()) }
                    },
                    |range| self.disk.discard(range.position, range.length),
                )
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                self.each_range(
                    &mut chain.readable,
                    memory,
                    MAX_ZEROES_SECTORS,
                    |_| Ok(()),
                    |range| self.disk.write_zeroes(range.position, range.length, range.unmap),
                )
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.readonly { Err(Failure::Io) } else { Ok(()) }
    }

    /// Where on the disk `data` at `sector` begins, if all of it is whole sectors of the disk.
    fn position(&self, sector: u64, data: &Buffers) -> Result<u64, Failure> {
        let length = data.len() as u64;
        let position = sector.checked_mul(SECTOR).ok_or(Failure::Io)?;
        let valid = length > 0 && length.is_multiple_of(SECTOR) && self.disk.contains(position, length);
        if valid { Ok(position) } else { Err(Failure::Io) }
    }

    /// Checks all ranges in `data`, then calls `act` for each.
    fn each_range(
        &self,
        data: &mut Buffers,
        memory: &GuestMemory,
        max_sectors: u32,
        check: impl Fn(SectorRange) -> Result<(), Failure>,
        act: impl Fn(SectorRange) -> io::Result<()>,
    ) -> Result<(), Failure> {
        const BYTES: usize = 16;
        let count = data.len() / BYTES;
        if count == 0 || !data.len().is_multiple_of(BYTES) || count > MAX_RANGES as usize {
            return Err(Failure::Io);
        }
        let mut ranges = [SectorRange { position: 0, length: 0, unmap: false }; MAX_RANGES as usize];
        for range in &mut ranges[..count] {
            let mut bytes = [0; BYTES];
            data.read(memory, &mut bytes).ok_or(Failure::Io)?;
            *range = self.parse_range(&bytes, max_sectors)?;
            check(*range)?;
        }
        for range in &ranges[..count] {
            act(*range)?;
        }
        Ok(())
    }

    fn parse_range(&self, bytes: &[u8; 16], max_sectors: u32) -> Result<SectorRange, Failure> {
        let (sector, rest) = bytes.split_first_chunk::<8>().expect("16 bytes");
        let (sectors, flags) = rest.split_first_chunk::<4>().expect("8 bytes");
        let (sector, sectors) = (u64::from_le_bytes(*sector), u32::from_le_bytes(*sectors));
        let flags = u32::from_le_bytes(flags.try_into().expect("4 bytes"));
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(Failure::Unsupported);
        }
        let position = sector.checked_mul(SECTOR).ok_or(Failure::Io)?;
        let length = u64::from(sectors) * SECTOR;
        if sectors > max_sectors || !self.disk.contains(position, length) {
            return Err(Failure::Io);
        }
        Ok(SectorRange { position, length, unmap: flags != 0 })
    }
}

#[cfg(test)]
mod tests;
