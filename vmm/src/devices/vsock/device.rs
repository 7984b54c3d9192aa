//! The socket device as its transport sees it.

use std::io;
use std::os::unix::net::UnixListener;

use isopod_proto::ErrorKind;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::muxer::Muxer;
use super::packet::MAX_PAYLOAD;
use super::worker::{FIRST_SOCKET, VsockWorker};
use crate::devices::chain::Chain;
use crate::devices::queue::{DeviceQueue, RING_FEATURES};
use crate::devices::read_config;
use crate::devices::worker::{FaultLog, Worker};
use crate::virtio::{ActivateError, Activation, VirtioDevice};

/// Receive, transmit, event (5.10.2).
const QUEUE_SIZES: &[u16] = &[256, 256, 16];
/// VIRTIO_VSOCK_F_STREAM (5.10.3).
const FEATURE_STREAM: u64 = 1;

/// Why a [`Vsock`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is one with a meaning of its own.
    #[error("{cid} is no context id for a guest: it must be from 3 to 4294967294")]
    InvalidCid {
        /// The context id.
        cid: u64,
    },
    /// The listening socket cannot be made non-blocking.
    #[error("the listening socket of guest {cid} cannot be made non-blocking")]
    Listener {
        /// The guest's context id.
        cid: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl VsockError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidCid { .. } => ErrorKind::InvalidArgument,
            Self::Listener { .. } => ErrorKind::Internal,
        }
    }
}

/// The socket device.
pub struct Vsock {
    listener: UnixListener,
    guest_cid: u64,
    worker: Option<Worker>,
    log: FaultLog,
}

impl Vsock {
    /// A device whose host side is `listener`. Connections to it are accepted from activation on; until then they wait in
    /// its backlog. A reset closes all that were accepted.
    pub fn new(listener: UnixListener, guest_cid: u64) -> Result<Self, VsockError> {
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::InvalidCid { cid: guest_cid });
        }
        listener.set_nonblocking(true).map_err(|source| VsockError::Listener { cid: guest_cid, source })?;
        Ok(Self { listener, guest_cid, worker: None, log: FaultLog::new() })
    }

    fn start(&self, activation: Activation) -> io::Result<Worker> {
        let (queues, launch) = DeviceQueue::take_over(activation);
        let mut queues = queues.into_iter().peekable();
        let mut take = |index| queues.next_if(|queue| queue.index() == index);
        let (Some(rx), Some(tx)) = (take(0), take(1)) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the driver did not enable both data queues"));
        };
        let worker = VsockWorker {
            rx,
            tx,
            event: take(2),
            listener: self.listener.try_clone()?,
            accept_again: None,
            muxer: Muxer::new(self.guest_cid, FIRST_SOCKET),
            chain: Chain::default(),
            payload: vec![0; MAX_PAYLOAD],
        };
        launch.worker("vsock", self.log.clone(), worker)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_VSOCK as u16
    }

    fn name(&self) -> String {
        "vsock".to_owned()
    }

    fn features(&self) -> u64 {
        RING_FEATURES | FEATURE_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker = Some(self.start(activation).map_err(ActivateError::no_worker(self.name()))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[cfg(test)]
mod tests;
