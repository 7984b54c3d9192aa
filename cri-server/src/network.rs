//! The built-in pod network: one bridge whose first address is the pods' gateway, a tap for each pod, and masquerading.

mod link;
mod masquerade;
mod tap;

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use isopod_proto::{ErrorKind, ObjectId};
use tokio::sync::Mutex;

use crate::config::NetworkConfig;
use crate::store::{StateError, Store};

/// The pods' network.
pub struct Network {
    config: NetworkConfig,
    store: Store,
    /// Whether bridge, forwarding and masquerading have been set up since the daemon started.
    prepared: Mutex<bool>,
}

/// A pod's part of the network.
#[derive(Debug)]
pub struct Attachment {
    /// The pod's address.
    pub address: Ipv4Addr,
    /// The pod's open tap.
    pub tap: OwnedFd,
}

/// The network cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No address, or no database.
    #[error("cannot get the pod an address")]
    Address(#[source] StateError),
    /// Netlink does not even open.
    #[error("cannot open a netlink socket")]
    Netlink(#[source] std::io::Error),
    /// An interface is not there.
    #[error("interface {name} does not exist")]
    NoInterface {
        /// Which.
        name: String,
    },
    /// A netlink request failed.
    #[error("cannot {doing} interface {name}")]
    Interface {
        /// What was tried.
        doing: &'static str,
        /// With which interface.
        name: String,
        /// Why not.
        #[source]
        source: rtnetlink::Error,
    },
    /// The tap cannot be opened.
    #[error("cannot open tap {name}")]
    Tap {
        /// Which.
        name: String,
        /// Why not.
        #[source]
        source: isopod_vmm::tap::TapError,
    },
    /// A kernel setting cannot be changed.
    #[error("cannot set {path}")]
    Setting {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The nftables rules cannot be set.
    #[error("cannot set the nftables rules for masquerading: {problem}")]
    Masquerade {
        /// Why not.
        problem: String,
    },
}

impl NetworkError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Address(error) => error.kind(),
            Self::Masquerade { .. } | Self::Tap { .. } => ErrorKind::FailedPrecondition,
            Self::Netlink(_) | Self::NoInterface { .. } | Self::Interface { .. } | Self::Setting { .. } => {
                ErrorKind::Internal
            }
        }
    }
}

impl Network {
    /// The network that `config` describes. Nothing is made before [`Network::prepare`] or the first pod.
    pub fn new(config: NetworkConfig, store: Store) -> Self {
        Self { config, store, prepared: Mutex::new(false) }
    }

    /// The pods' gateway: the subnet's first address.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.config.subnet.to_bits() + 1)
    }

    /// The subnet's prefix length.
    pub fn prefix(&self) -> u8 {
        self.config.prefix
    }

    /// MTU of the pods' interfaces.
    pub fn mtu(&self) -> u32 {
        self.config.mtu
    }

    /// Gives the pod an address and a tap on the bridge.
    pub async fn attach(&self, sandbox: &ObjectId) -> Result<Attachment, NetworkError> {
        self.prepare().await?;
        let last = self.config.subnet.to_bits() | (u32::MAX >> self.config.prefix);
        let first = Ipv4Addr::from_bits(self.config.subnet.to_bits() + 2);
        let address = self
            .store
            .allocate_address(first, Ipv4Addr::from_bits(last - 1), sandbox)
            .await
            .map_err(NetworkError::Address)?;
        let name = tap_name(sandbox);
        let tap = tap::open(&name)?;
        let links = link::Links::open()?;
        links.join(&name, &self.config.bridge, self.config.mtu).await?;
        Ok(Attachment { address, tap })
    }

    /// Takes the pod's address and tap back. Nothing to take is a success.
    pub async fn detach(&self, sandbox: &ObjectId) -> Result<(), NetworkError> {
        // The kernel removes a tap with its last descriptor, so this finds one only if the VMM is not quite gone.
        link::Links::open()?.remove(&tap_name(sandbox)).await?;
        self.store.release_address(sandbox).await.map_err(NetworkError::Address)
    }

    /// Removes taps of the daemon's that none of `known` has.
    pub async fn remove_orphans(&self, known: &[ObjectId]) -> Result<(), NetworkError> {
        let expected: Vec<String> = known.iter().map(tap_name).collect();
        let links = link::Links::open()?;
        for name in links.ports(&self.config.bridge).await? {
            if is_tap_name(&name) && !expected.contains(&name) {
                tracing::info!(tap = name, "removing a tap that no sandbox has");
                links.remove(&name).await?;
            }
        }
        self.store.release_orphans(known.to_vec()).await.map_err(NetworkError::Address)
    }

    /// Makes the bridge, forwarding and masquerading, unless they are there. The daemon does so at its start; each pod asks again.
    pub async fn prepare(&self) -> Result<(), NetworkError> {
        let mut prepared = self.prepared.lock().await;
        if *prepared {
            // Somebody may have deleted the bridge meanwhile.
            if link::Links::open()?.exists(&self.config.bridge).await? {
                return Ok(());
            }
        }
        let gateway = self.gateway();
        let links = link::Links::open()?;
        links.bridge(&self.config.bridge, mac_of(gateway), gateway, self.config.prefix, self.config.mtu).await?;
        set("/proc/sys/net/ipv4/ip_forward", "1")?;
        if self.config.masquerade {
            masquerade::set(&self.config).await?;
        }
        *prepared = true;
        Ok(())
    }
}

fn set(path: &str, value: &str) -> Result<(), NetworkError> {
    std::fs::write(path, value).map_err(|source| NetworkError::Setting { path: path.into(), source })
}

/// The name of a sandbox's tap.
pub fn tap_name(sandbox: &ObjectId) -> String {
    format!("ip{}", sandbox.short())
}

fn is_tap_name(name: &str) -> bool {
    name.strip_prefix("ip").is_some_and(|id| id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The MAC address that goes with an IPv4 address: locally administered, so that it is nobody else's.
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_named_after_its_sandbox_within_the_kernels_limit() {
        let name = tap_name(&ObjectId::from_random([0x5a; 32]));
        assert_eq!(name, "ip5a5a5a5a5a5a");
        assert!(name.len() <= 15 && is_tap_name(&name));
        assert!(!is_tap_name("ip_vti0") && !is_tap_name("isopod0") && !is_tap_name("ip5a5a5a5a5a5g"));
    }

    #[test]
    fn a_mac_is_local_and_unicast() {
        let mac = mac_of(Ipv4Addr::new(10, 88, 0, 5));
        assert_eq!(mac, [0x0a, 0x58, 10, 88, 0, 5]);
        assert_eq!(mac[0] & 0b11, 0b10);
    }
}
