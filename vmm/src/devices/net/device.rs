//! The network device as its transport sees it.

use std::io;
use std::os::fd::OwnedFd;

use isopod_proto::ErrorKind;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::worker::NetWorker;
use crate::devices::queue::{DeviceQueue, RING_FEATURES};
use crate::devices::read_config;
use crate::devices::worker::{FaultLog, Worker};
use crate::tap;
use crate::virtio::{ActivateError, Activation, VirtioDevice};

/// Receive, transmit (5.1.2).
const QUEUE_SIZES: &[u16] = &[256, 256];
/// The smallest MTU a driver takes (5.1.4.2).
const MIN_MTU: u16 = 68;
/// Bytes of struct virtio_net_config (5.1.4) up to and with mtu.
const CONFIG_BYTES: usize = 12;

/// Why a [`Net`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The address is a group's, or none.
    #[error("{mac:02x?} is no address of an interface: it is a group's or all zeroes")]
    InvalidMac {
        /// The address.
        mac: [u8; 6],
    },
    /// No driver takes the MTU.
    #[error("an MTU of {mtu} bytes is less than the least of 68")]
    InvalidMtu {
        /// The MTU in bytes.
        mtu: u16,
    },
    /// The descriptor is not a tap's, or the tap cannot be set up.
    #[error("the descriptor cannot be used as a tap: {what} failed")]
    Tap {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl NetError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidMac { .. } | Self::InvalidMtu { .. } | Self::Tap { .. } => ErrorKind::InvalidArgument,
        }
    }
}

/// A network interface of the guest.
pub struct Net {
    tap: OwnedFd,
    config: [u8; CONFIG_BYTES],
    worker: Option<Worker>,
    log: FaultLog,
}

impl Net {
    /// An interface with address `mac` and `mtu` bytes at most in a packet, on `tap`, which was opened with IFF_TAP,
    /// IFF_NO_PI and IFF_VNET_HDR ([`tap::open`]).
    pub fn new(tap: OwnedFd, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::InvalidMac { mac });
        }
        if mtu < MIN_MTU {
            return Err(NetError::InvalidMtu { mtu });
        }
        let failed = |what| move |source| NetError::Tap { what, source };
        tap::set_header_size(&tap, tap::VNET_HEADER_BYTES).map_err(failed("TUNSETVNETHDRSZ"))?;
        rustix::io::ioctl_fionbio(&tap, true).map_err(|errno| failed("FIONBIO")(errno.into()))?;
        let mut config = [0; CONFIG_BYTES];
        config[..6].copy_from_slice(&mac);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        Ok(Self { tap, config, worker: None, log: FaultLog::new() })
    }

    fn start(&self, activation: Activation) -> Result<Worker, (&'static str, io::Error)> {
        let features = activation.features;
        tap::set_offloads(&self.tap, offloads(features)).map_err(|error| ("TUNSETOFFLOAD failed", error))?;
        let failed = |error| ("its worker cannot be started", error);
        let (queues, launch) = DeviceQueue::take_over(activation);
        let tap = self.tap.try_clone().map_err(failed)?;
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let worker = NetWorker::new(queues, tap, mergeable).map_err(failed)?;
        launch.worker(&self.name(), self.log.clone(), worker).map_err(failed)
    }
}

/// What the driver takes part in, as the tap is told of it.
fn offloads(features: u64) -> u32 {
    let has = |bit: u32| features & 1 << bit != 0;
    let mut flags = 0;
    // The others depend on it (5.1.3.1).
    if has(VIRTIO_NET_F_GUEST_CSUM) {
        flags |= libc::TUN_F_CSUM;
        if has(VIRTIO_NET_F_GUEST_TSO4) {
            flags |= libc::TUN_F_TSO4;
        }
        if has(VIRTIO_NET_F_GUEST_TSO6) {
            flags |= libc::TUN_F_TSO6;
        }
    }
    flags
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn name(&self) -> String {
        let [.., a, b] = &self.config[..6] else { unreachable!("6 bytes") };
        format!("net {a:02x}{b:02x}")
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
        ];
        bits.into_iter().fold(RING_FEATURES, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |(what, source)| ActivateError { device: self.name(), what, source };
        self.worker = Some(self.start(activation).map_err(failed)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_is_told_what_the_driver_takes_part_in() {
        let bit = |bit: u32| 1u64 << bit;
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(bit(VIRTIO_NET_F_GUEST_TSO4) | bit(VIRTIO_NET_F_CSUM)), 0);
        assert_eq!(
            offloads(bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_TSO6)),
            libc::TUN_F_CSUM | libc::TUN_F_TSO6
        );
    }

    #[test]
    fn bad_addresses_and_sizes_and_descriptors_that_are_no_taps_are_refused() {
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(matches!(Net::new(file(), [1, 0, 0, 0, 0, 1], 1500), Err(NetError::InvalidMac { .. })));
        assert!(matches!(Net::new(file(), [0; 6], 1500), Err(NetError::InvalidMac { .. })));
        assert!(matches!(Net::new(file(), [2, 0, 0, 0, 0, 1], 67), Err(NetError::InvalidMtu { mtu: 67 })));
        let error = Net::new(file(), [2, 0, 0, 0, 0, 1], 1500).err().unwrap();
        assert!(matches!(error, NetError::Tap { .. }));
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
