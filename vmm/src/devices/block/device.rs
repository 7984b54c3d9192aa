//! The block device as its transport sees it.

use std::io;
use std::sync::Arc;

use isopod_proto::{DiskId, ErrorKind};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::SECTOR;
use super::disk::{Disk, Segment};
use super::request::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS, Target};
use super::worker::BlockWorker;
use crate::devices::chain::Chain;
use crate::devices::queue::{DeviceQueue, RING_FEATURES};
use crate::devices::read_config;
use crate::devices::worker::{FaultLog, Worker};
use crate::virtio::{ActivateError, Activation, VirtioDevice};

const QUEUE_SIZES: &[u16] = &[256];
/// Most data descriptors of a request: the queue's, without header and status.
const SEG_MAX: u32 = 254;
/// Bytes of struct virtio_blk_config (5.2.4), up to and with write_zeroes_may_unmap.
const CONFIG_BYTES: usize = 60;

/// Why a [`Block`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The disk has no segment.
    #[error("a disk needs at least one segment")]
    NoSegment,
    /// A segment is not made of whole sectors.
    #[error("segment {index} ({length} bytes at {offset}) is not one or more whole sectors of 512 bytes")]
    Unaligned {
        /// Which segment, from 0.
        index: usize,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// A segment goes past the end of its file.
    #[error("segment {index} ({length} bytes at {offset}) is not within its file of {size} bytes")]
    FileTooShort {
        /// Which segment, from 0.
        index: usize,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Bytes in the file.
        size: u64,
    },
    /// The size of a segment's file cannot be found.
    #[error("the size of the file of segment {index} cannot be found")]
    Unreadable {
        /// Which segment, from 0.
        index: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The lengths add up to more than a file can have.
    #[error("the segments together are longer than a disk can be")]
    DiskTooLong,
}

impl BlockError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSegment | Self::Unaligned { .. } | Self::FileTooShort { .. } | Self::DiskTooLong => {
                ErrorKind::InvalidArgument
            }
            Self::Unreadable { .. } => ErrorKind::Internal,
        }
    }
}

/// A disk of the guest.
pub struct Block {
    target: Arc<Target>,
    config: [u8; CONFIG_BYTES],
    worker: Option<Worker>,
    log: FaultLog,
}

impl Block {
    /// A disk made of `segments` one after the other; its serial (VIRTIO_BLK_T_GET_ID) is `id`.
    pub fn new(id: DiskId, readonly: bool, segments: Vec<Segment>) -> Result<Self, BlockError> {
        let disk = Disk::new(segments)?;
        let config = config_space(disk.length() / SECTOR);
        Ok(Self { target: Arc::new(Target { disk, id, readonly }), config, worker: None, log: FaultLog::new() })
    }
}

/// Struct virtio_blk_config (5.2.4). Fields of features that are not offered are not read by the driver.
fn config_space(sectors: u64) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |offset: usize, value: u32| config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    put(12, SEG_MAX);
    put(20, SECTOR as u32);
    put(36, MAX_DISCARD_SECTORS);
    put(40, MAX_RANGES);
    // discard_sector_alignment: whole pages, which every file system can give back.
    put(44, 8);
    put(48, MAX_ZEROES_SECTORS);
    put(52, MAX_RANGES);
    // write_zeroes_may_unmap
    config[56] = 1;
    config[..8].copy_from_slice(&sectors.to_le_bytes());
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn name(&self) -> String {
        format!("block {}", self.target.id)
    }

    fn features(&self) -> u64 {
        let always = RING_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if self.target.readonly {
            return always | 1 << VIRTIO_BLK_F_RO;
        }
        always | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (queues, launch) = DeviceQueue::take_over(activation);
        let worker = BlockWorker { queues, target: Arc::clone(&self.target), chain: Chain::default() };
        let name = self.name();
        let worker = launch.worker(&name, self.log.clone(), worker);
        self.worker = Some(worker.map_err(ActivateError::no_worker(name))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
