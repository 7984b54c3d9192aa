//! The pods' network: by CNI plugins where the node's CNI directory has a configuration, built-in otherwise.
//!
//! A pod keeps the network it began with, whatever the configuration becomes: what it has of CNI is in a file of its own
//! ([`crate::cni::Attachments`]), and all else is of the built-in network.

mod builtin;
mod guard;
mod inside;
mod link;
mod namespace;
mod nft;
mod plugged;
pub mod pod;
pub mod ports;
mod rules;
mod setting;
mod tap;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use isopod_proto::{ErrorKind, ObjectId};

use self::builtin::Builtin;
use self::plugged::Plugged;
use self::pod::PodNetwork;
use self::ports::{Claim, HostPort};
use crate::cni::CniError;
use crate::config::Config;
use crate::cri;
use crate::grpc::status::chain;
use crate::store::{StateError, Store};

/// The pods' network.
pub struct Network {
    builtin: Builtin,
    plugged: Plugged,
}

/// Why pods cannot have a network now, as CRI's conditions tell it.
#[derive(Debug)]
pub struct Problem {
    /// One word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// A pod's part of the network.
#[derive(Debug)]
pub struct Attachment {
    /// What the guest is to have.
    pub network: PodNetwork,
    /// The pod's open tap.
    pub tap: OwnedFd,
}

/// A sandbox that an earlier daemon left.
#[derive(Clone)]
pub struct KnownPod {
    /// Its id.
    pub sandbox: ObjectId,
    /// Its configuration.
    pub config: cri::PodSandboxConfig,
    /// What it has of the network; none after it was stopped.
    pub network: Option<PodNetwork>,
}

impl KnownPod {
    /// What it has of the node's ports: none if it has no network.
    fn claim(&self) -> Option<Claim> {
        let network = self.network.as_ref()?;
        // They were valid when the sandbox was made.
        let ports = ports::parse(&self.config.port_mappings).unwrap_or_default();
        Some(Claim { pod: pod_name(&self.config), network: Some(network.clone()), ports })
    }
}

/// The network cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No address, or no database.
    #[error("cannot get the pod an address")]
    Address(#[source] StateError),
    /// The configuration asks for what is no host port.
    #[error("config.port_mappings: {0}")]
    Ports(String),
    /// Another pod has the port.
    #[error("host port {port} is in use by pod {pod} (sandbox {sandbox})")]
    PortTaken {
        /// The port as the other pod has it.
        port: HostPort,
        /// The other pod.
        pod: String,
        /// Its sandbox.
        sandbox: ObjectId,
    },
    /// CNI.
    #[error("CNI")]
    Cni(#[source] CniError),
    /// What the plugins made is not what a guest can take over.
    #[error("what the CNI plugins made cannot be used: {problem}")]
    Unusable {
        /// What is wrong with it.
        problem: String,
    },
    /// A pod's network namespace.
    #[error("cannot {doing} the network namespace {path}")]
    Namespace {
        /// What was tried.
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// No thread to work in a namespace.
    #[error("a thread for a network namespace failed")]
    Thread(#[source] std::io::Error),
    /// Something the network cannot do.
    #[error("isopod does not support {what}")]
    Unsupported {
        /// What it is.
        what: String,
    },
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
    #[error("cannot set the nftables rules of the pods' network: {problem}")]
    Nft {
        /// Why not.
        problem: String,
    },
}

impl NetworkError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Address(error) => error.kind(),
            Self::Ports(_) => ErrorKind::InvalidArgument,
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::Cni(error) => error.kind(),
            Self::PortTaken { .. } | Self::Nft { .. } | Self::Tap { .. } => ErrorKind::FailedPrecondition,
            Self::Netlink(_)
            | Self::NoInterface { .. }
            | Self::Interface { .. }
            | Self::Setting { .. }
            | Self::Unusable { .. }
            | Self::Namespace { .. }
            | Self::Thread(_) => ErrorKind::Internal,
        }
    }
}

impl Network {
    /// The network that `config` describes. Nothing is made before [`Network::prepare`] or the first pod.
    pub fn new(config: &Config, store: Store) -> Self {
        Self {
            builtin: Builtin::new(config.network.clone(), store),
            plugged: Plugged::new(&config.cni, &config.root, &config.state),
        }
    }

    /// Gives the pod its network.
    pub async fn attach(&self, sandbox: &ObjectId, config: &cri::PodSandboxConfig) -> Result<Attachment, NetworkError> {
        let ports = ports::parse(&config.port_mappings).map_err(NetworkError::Ports)?;
        match self.plugged.network()? {
            Some(list) => self.plugged.attach(list, sandbox, config, ports).await,
            None => self.builtin.attach(sandbox, &pod_name(config), ports).await,
        }
    }

    /// Takes the pod's network back, whichever it has. Nothing to take is a success.
    pub async fn detach(&self, sandbox: &ObjectId) -> Result<(), NetworkError> {
        self.plugged.detach(sandbox).await?;
        self.builtin.detach(sandbox).await
    }

    /// Takes note of what an earlier daemon's pods have, before [`Self::prepare`] makes the rules anew.
    pub async fn adopt(&self, known: &[KnownPod]) {
        self.plugged.adopt(known);
        self.builtin.adopt(&self.of_builtin(known)).await;
    }

    /// Takes up the pods of an earlier daemon, and removes what belongs to none of them.
    pub async fn restore(&self, known: &[KnownPod]) -> Result<(), NetworkError> {
        self.plugged.restore(known).await;
        self.builtin.restore(&self.of_builtin(known)).await
    }

    fn of_builtin(&self, known: &[KnownPod]) -> Vec<KnownPod> {
        known.iter().filter(|pod| !self.plugged.has(&pod.sandbox)).cloned().collect()
    }

    /// Makes what all pods share. The daemon does so at its start; each pod asks again.
    pub async fn prepare(&self) -> Result<(), NetworkError> {
        match self.plugged.network()? {
            Some(_) => Ok(()),
            None => self.builtin.prepare().await,
        }
    }

    /// Whether a pod could have a network now. Reads the CNI configuration anew.
    pub async fn status(&self) -> Result<(), Problem> {
        let plugged = match self.plugged.network() {
            Ok(Some(list)) => self.plugged.status(&list).await,
            Ok(None) => {
                let prepared = self.builtin.status().await;
                return prepared
                    .map_err(|error| Problem { reason: "NetworkNotReady", message: chain(&error).to_string() });
            }
            Err(error) => Err(error),
        };
        plugged.map_err(|error| Problem { reason: "NetworkPluginNotReady", message: chain(&error).to_string() })
    }
}

/// A pod as people call it: namespace/name.
fn pod_name(config: &cri::PodSandboxConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    format!("{}/{}", metadata.namespace, metadata.name)
}

/// The name of a sandbox's tap.
pub fn tap_name(sandbox: &ObjectId) -> String {
    format!("ip{}", sandbox.short())
}

fn is_tap_name(name: &str) -> bool {
    name.strip_prefix("ip").is_some_and(|id| id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
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
}
