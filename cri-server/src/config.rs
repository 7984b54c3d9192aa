//! The daemon's configuration: a TOML file ([`RawConfig`]) that becomes a checked [`Config`]. One run reports every mistake.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::Ipv6Net;
use serde::{Deserialize, Serialize};

use crate::cgroup;

mod check;
#[cfg(test)]
mod tests;

/// The file `isopod config default` prints.
pub const DEFAULT_FILE: &str = include_str!("../../deploy/isopod.toml");

/// The configuration file as it is written.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    /// The CRI socket, `unix:///absolute/path`.
    pub socket: Option<String>,
    /// Whose members may open it besides root.
    pub socket_group: Option<RawGroup>,
    /// What outlives a reboot: images, the database, scratch disks.
    pub root: Option<PathBuf>,
    /// What does not: sockets and exit records of running VMs.
    pub state: Option<PathBuf>,
    /// A `tracing` filter, such as `info` or `isopod=debug`.
    pub log_level: Option<String>,
    /// `cgroupfs` or `systemd`; by default what the machine's init is.
    pub cgroup_driver: Option<cgroup::Driver>,
    /// The microVMs.
    pub vmm: RawVmm,
    /// The images.
    pub images: RawImages,
    /// The built-in pod network.
    pub network: RawNetwork,
    /// Networks by CNI plugins.
    pub cni: RawCni,
    /// Exec, attach and port-forward.
    pub streaming: RawStreaming,
}

/// A group, as it is written.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(untagged)]
pub enum RawGroup {
    /// Its number.
    Id(u32),
    /// Its name on this host.
    Name(String),
}

/// Section `[vmm]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawVmm {
    /// The `isopod-vmm` program.
    pub binary: Option<PathBuf>,
    /// The `isopod-fs` program; by default the one beside `binary`.
    pub file_server: Option<PathBuf>,
    /// The guest kernel: an uncompressed ELF vmlinux.
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs, which holds the agent.
    pub initramfs: Option<PathBuf>,
    /// Virtual CPUs of a pod that has no CPU limit.
    pub vcpus: Option<u32>,
    /// Memory of a pod that has no memory limit, in MiB.
    pub memory_mib: Option<u64>,
    /// Virtual CPUs that a pod can be resized to.
    pub max_vcpus: Option<u32>,
    /// Memory that a pod's VM can be resized to, in MiB.
    pub max_memory_mib: Option<u64>,
    /// How long a guest may take until its agent says hello, in seconds.
    pub boot_deadline_seconds: Option<u64>,
    /// Let the guest kernel print all its messages to the console ring.
    pub verbose_console: Option<bool>,
    /// Size of a pod's scratch disk, in MiB; the file is sparse.
    pub scratch_mib: Option<u64>,
    /// The first of the users that the VMMs are, one a sandbox; groups have the same numbers.
    pub first_uid: Option<u32>,
    /// How many such users there are.
    pub uids: Option<u32>,
}

/// Section `[images]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawImages {
    /// Registry host, as in an image name, to the URL of its mirror.
    pub mirrors: BTreeMap<String, String>,
    /// containerd's `certs.d`, for registries that are not among the mirrors.
    pub certs_directory: Option<PathBuf>,
    /// Archives and OCI layouts that are imported when the daemon starts.
    pub preload: Option<PathBuf>,
    /// Most bytes a layer may have after decompression, in MiB.
    pub max_layer_mib: Option<u64>,
    /// Layers fetched and converted at once by one pull.
    pub concurrent_layers: Option<u32>,
    /// Layers fetched and converted at once by all pulls together.
    pub concurrent_layers_total: Option<u32>,
    /// A pull that gets no byte for so long fails, in seconds.
    pub progress_timeout_seconds: Option<u64>,
}

/// Section `[network]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawNetwork {
    /// Name of the bridge the pods' taps are ports of.
    pub bridge: Option<String>,
    /// The pods' addresses, such as `10.88.0.0/16`; the bridge has the first one.
    pub subnet: Option<String>,
    /// The pods' IPv6 addresses, such as `fd69:736f:706f:64::/64`; the bridge has the first one.
    pub subnet6: Option<String>,
    /// MTU of the bridge, the taps, and the pods' interfaces.
    pub mtu: Option<u32>,
    /// Give what pods send out of the subnets the node's address.
    pub masquerade: Option<bool>,
}

/// Section `[cni]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawCni {
    /// Where the configuration is; with none there, pods are on the built-in network.
    pub config_directory: Option<PathBuf>,
    /// Where the plugins are, in the order to look.
    pub plugin_directories: Option<Vec<PathBuf>>,
    /// How long a plugin may take for one command, in seconds.
    pub deadline_seconds: Option<u64>,
}

/// Section `[streaming]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawStreaming {
    /// Where clients of exec, attach and port-forward connect: an address of the loopback interface.
    pub address: Option<String>,
    /// The port; 0 means any.
    pub port: Option<u16>,
    /// A client that is silent for so long is disconnected, in seconds.
    pub idle_timeout_seconds: Option<u64>,
}

/// The configuration, checked and complete.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Path of the CRI socket.
    pub socket: PathBuf,
    /// The group that may open it; none for root alone.
    pub socket_group: Option<u32>,
    /// What outlives a reboot.
    pub root: PathBuf,
    /// What does not. Called `stateDir` in the verbose status, where critest looks for it.
    #[serde(rename = "stateDir")]
    pub state: PathBuf,
    /// A `tracing` filter.
    pub log_level: String,
    /// Who makes the sandboxes' cgroups.
    pub cgroup_driver: cgroup::Driver,
    /// The microVMs.
    pub vmm: VmmConfig,
    /// The images.
    pub images: ImagesConfig,
    /// The built-in pod network.
    pub network: NetworkConfig,
    /// Networks by CNI plugins.
    pub cni: CniConfig,
    /// Exec, attach and port-forward.
    pub streaming: StreamingConfig,
}

/// Settings of the microVMs.
#[derive(Clone, Debug, Serialize)]
pub struct VmmConfig {
    /// The `isopod-vmm` program.
    pub binary: PathBuf,
    /// The `isopod-fs` program.
    pub file_server: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// Virtual CPUs of a pod without a CPU limit: 1 to 64.
    pub vcpus: u32,
    /// Bytes of memory of a pod without a memory limit.
    pub memory_bytes: u64,
    /// Virtual CPUs that a pod can be resized to: 1 to 64. `None`: as many as the host has, eight at most.
    pub max_vcpus: Option<u32>,
    /// Bytes of memory that a pod's VM can be resized to. `None`: as much as the host has.
    pub max_memory_bytes: Option<u64>,
    /// From the start of the VMM to the agent's hello.
    pub boot_deadline: Duration,
    /// All kernel messages go to the console ring.
    pub verbose_console: bool,
    /// Bytes of a pod's scratch disk.
    pub scratch_bytes: u64,
    /// The users that the VMMs are.
    pub users: UserRange,
}

/// Users, and groups of the same numbers, that nothing else on the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct UserRange {
    /// The first.
    pub first: u32,
    /// How many, at least 1.
    pub count: u32,
}

/// Settings of the image store.
#[derive(Clone, Debug, Serialize)]
pub struct ImagesConfig {
    /// Registry host to the URL of its mirror.
    pub mirrors: BTreeMap<String, String>,
    /// containerd's `certs.d`, for registries that are not among the mirrors.
    pub certs_directory: PathBuf,
    /// Archives and OCI layouts that are imported when the daemon starts.
    pub preload: Option<PathBuf>,
    /// Most bytes of a decompressed layer.
    pub max_layer_bytes: u64,
    /// Layers fetched and converted at once by one pull.
    pub concurrent_layers: usize,
    /// Layers fetched and converted at once by all pulls together.
    pub concurrent_layers_total: usize,
    /// Longest silence of a registry.
    pub progress_timeout: Duration,
}

/// Settings of the built-in network.
#[derive(Clone, Debug, Serialize)]
pub struct NetworkConfig {
    /// Name of the bridge.
    pub bridge: String,
    /// Network address of the pods' subnet.
    pub subnet: Ipv4Addr,
    /// Its prefix length: 8 to 29.
    pub prefix: u8,
    /// The pods' IPv6 subnet, with at least as many addresses as the IPv4 one.
    pub subnet6: Ipv6Net,
    /// MTU of all its interfaces.
    pub mtu: u32,
    /// Masquerading by nftables.
    pub masquerade: bool,
}

/// Settings of CNI.
#[derive(Clone, Debug, Serialize)]
pub struct CniConfig {
    /// Where the configuration is.
    pub config_directory: PathBuf,
    /// Where the plugins are, in the order to look.
    pub plugin_directories: Vec<PathBuf>,
    /// How long a plugin may take for one command.
    pub deadline: Duration,
}

/// Settings of the streaming server.
#[derive(Clone, Debug, Serialize)]
pub struct StreamingConfig {
    /// Where it listens.
    pub address: SocketAddr,
    /// Longest silence of a client.
    pub idle_timeout: Duration,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, or has a field that does not exist.
    #[error("the configuration file {path} cannot be understood")]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Values that are not allowed.
    #[error("the configuration file {path} has {} mistakes:{}", mistakes.len(), lines(mistakes))]
    Mistakes {
        /// Which file.
        path: PathBuf,
        /// Every one of them.
        mistakes: Vec<Mistake>,
    },
}

/// A value that is not allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Such as `network.mtu`.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

fn lines(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(|mistake| format!("\n  {mistake}")).collect()
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Checks the contents of a configuration file; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text)
            .map_err(|source| ConfigError::Syntax { path: path.into(), source: Box::new(source) })?;
        Self::check(raw).map_err(|mistakes| ConfigError::Mistakes { path: path.into(), mistakes })
    }
}
