//! The file system device as its transport sees it.

use std::io;
use std::os::fd::OwnedFd;

use isopod_proto::ErrorKind;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::link::Link;
use super::worker::FsWorker;
use crate::devices::queue::{DeviceQueue, RING_FEATURES};
use crate::devices::read_config;
use crate::devices::worker::{FaultLog, Worker};
use crate::virtio::{ActivateError, Activation, VirtioDevice};

/// The queue for requests that must not wait, and the one for all others (5.11.2). The driver uses at most the size of a
/// queue less 4 pages for one request: with these, 256 pages, which is what the server agrees to.
const QUEUE_SIZES: &[u16] = &[128, 512];
/// Bytes of a tag (5.11.4).
const TAG_BYTES: usize = 36;
/// Bytes of struct virtio_fs_config without notify_buf_size, which belongs to a feature that is not offered.
const CONFIG_BYTES: usize = TAG_BYTES + 4;

/// Why an [`Fs`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is none.
    #[error("a tag has 1 to {TAG_BYTES} ASCII letters, digits and '-'")]
    Tag,
    /// The descriptor is not what it should be.
    #[error("the socket to the file server cannot be used")]
    Socket(#[source] io::Error),
}

impl FsError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Tag | Self::Socket(_) => ErrorKind::InvalidArgument,
        }
    }
}

/// A file system of the guest, served elsewhere.
pub struct Fs {
    config: [u8; CONFIG_BYTES],
    tag: String,
    /// The way to the server, until the first activation: a driver that comes back after a reset would have to begin the FUSE
    /// session anew, which the server does not.
    link: Option<Link>,
    worker: Option<Worker>,
    log: FaultLog,
}

impl Fs {
    /// A file system that the guest mounts as `tag`; `socket` is connected to its server.
    pub fn new(tag: &str, socket: OwnedFd) -> Result<Self, FsError> {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if tag.is_empty() || tag.len() > TAG_BYTES || !tag.bytes().all(valid) {
            return Err(FsError::Tag);
        }
        rustix::net::sockopt::socket_type(&socket).map_err(|error| FsError::Socket(error.into()))?;
        let mut config = [0; CONFIG_BYTES];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        // num_request_queues
        config[TAG_BYTES..].copy_from_slice(&1u32.to_le_bytes());
        let link = Some(Link::new(socket).map_err(FsError::Socket)?);
        Ok(Self { config, tag: tag.to_owned(), link, worker: None, log: FaultLog::new() })
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_FS as u16
    }

    fn name(&self) -> String {
        format!("fs {}", self.tag)
    }

    fn features(&self) -> u64 {
        RING_FEATURES
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
        let worker = FsWorker::new(queues, self.link.take());
        let name = self.name();
        let worker = launch.worker(&name, self.log.clone(), worker);
        self.worker = Some(worker.map_err(ActivateError::no_worker(name))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
