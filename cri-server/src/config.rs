//! The daemon's configuration: a TOML file ([`RawConfig`]) that becomes a checked [`Config`]. One run reports every mistake.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::Ipv6Net;
use serde::{Deserialize, Serialize};

/// The file `isopod config default` prints.
pub const DEFAULT_FILE: &str = include_str!("../../deploy/isopod.toml");

const MIB: u64 = 1024 * 1024;
/// `sockaddr_un.sun_path` is 108 bytes with its NUL; below the state directory go "/sandboxes/<12 digits>/control.sock".
const MAX_STATE_DIR: usize = 107 - "/sandboxes/0123456789ab/control.sock".len();

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

    /// Checks every value and fills in what is not given.
    pub fn check(raw: RawConfig) -> Result<Self, Vec<Mistake>> {
        let mut mistakes = Mistakes::default();
        let socket = raw.socket.unwrap_or_else(|| "unix:///run/isopod/isopod.sock".to_owned());
        let socket = match socket.strip_prefix("unix://") {
            Some(path) => mistakes.absolute("socket", path.into()),
            None => {
                mistakes.add("socket", format!("{socket:?} does not start with unix://"));
                PathBuf::new()
            }
        };
        let state = mistakes.absolute("state", raw.state.unwrap_or_else(|| "/run/isopod".into()));
        if state.as_os_str().len() > MAX_STATE_DIR {
            mistakes
                .add("state", format!("longer than {MAX_STATE_DIR} bytes, so its sockets would have no valid name"));
        }
        let root = mistakes.absolute("root", raw.root.unwrap_or_else(|| "/var/lib/isopod".into()));
        let socket_group = raw.socket_group.and_then(|group| check_group(group, &mut mistakes));
        if socket_group.is_some() && (socket.starts_with(&state) || socket.starts_with(&root)) {
            let problem = "only root can enter `state` and `root`: the socket of a group must be in another directory";
            mistakes.add("socket_group", problem.to_owned());
        }
        let config = Self {
            socket,
            socket_group,
            root,
            state,
            log_level: raw.log_level.unwrap_or_else(|| "info".to_owned()),
            vmm: check_vmm(raw.vmm, &mut mistakes),
            images: check_images(raw.images, &mut mistakes),
            network: check_network(raw.network, &mut mistakes),
            cni: check_cni(raw.cni, &mut mistakes),
            streaming: check_streaming(raw.streaming, &mut mistakes),
        };
        if config.log_level.parse::<tracing_subscriber::EnvFilter>().is_err() {
            mistakes.add("log_level", format!("{:?} is not a filter such as info or isopod=debug", config.log_level));
        }
        if mistakes.0.is_empty() { Ok(config) } else { Err(mistakes.0) }
    }
}

fn check_group(group: RawGroup, mistakes: &mut Mistakes) -> Option<u32> {
    let name = match group {
        RawGroup::Id(id) => return Some(id),
        RawGroup::Name(name) => name,
    };
    match nix::unistd::Group::from_name(&name) {
        Ok(Some(group)) => return Some(group.gid.as_raw()),
        Ok(None) => mistakes.add("socket_group", format!("there is no group {name:?}")),
        Err(error) => mistakes.add("socket_group", format!("cannot look for the group {name:?}: {error}")),
    }
    None
}

fn check_vmm(raw: RawVmm, mistakes: &mut Mistakes) -> VmmConfig {
    let path = |given: Option<PathBuf>, default: &str| given.unwrap_or_else(|| default.into());
    let binary = path(raw.binary, "/usr/libexec/isopod/isopod-vmm");
    let file_server = raw.file_server.unwrap_or_else(|| binary.with_file_name("isopod-fs"));
    VmmConfig {
        binary: mistakes.absolute("vmm.binary", binary),
        file_server: mistakes.absolute("vmm.file_server", file_server),
        kernel: mistakes.absolute("vmm.kernel", path(raw.kernel, "/usr/share/isopod/vmlinux")),
        initramfs: mistakes.absolute("vmm.initramfs", path(raw.initramfs, "/usr/share/isopod/initramfs.cpio")),
        vcpus: mistakes.within("vmm.vcpus", raw.vcpus.unwrap_or(1).into(), 1, 64) as u32,
        memory_bytes: mistakes.within("vmm.memory_mib", raw.memory_mib.unwrap_or(256), 64, 1 << 20) * MIB,
        boot_deadline: Duration::from_secs(mistakes.within(
            "vmm.boot_deadline_seconds",
            raw.boot_deadline_seconds.unwrap_or(60),
            1,
            200,
        )),
        verbose_console: raw.verbose_console.unwrap_or(false),
        scratch_bytes: mistakes.within("vmm.scratch_mib", raw.scratch_mib.unwrap_or(10 * 1024), 16, 1 << 24) * MIB,
        users: check_users(raw.first_uid, raw.uids, mistakes),
    }
}

fn check_users(first: Option<u32>, count: Option<u32>, mistakes: &mut Mistakes) -> UserRange {
    // By default what systemd leaves to nobody (https://systemd.io/UIDS-GIDS): above the users of containers, below 2^31.
    let first = first.unwrap_or(0x7000_0000);
    let count = mistakes.within("vmm.uids", count.unwrap_or(0x1_0000).into(), 1, 1 << 24) as u32;
    let last = u64::from(first) + u64::from(count) - 1;
    // Below are the users of the system and those who log in, above is what the kernel takes for "no user".
    mistakes.within("vmm.first_uid", first.into(), 1000, u64::from(u32::MAX) - 1);
    if last > u64::from(u32::MAX) - 1 {
        mistakes.add("vmm.uids", format!("{count} users from {first} on are more than there are"));
    }
    UserRange { first, count }
}

fn check_images(raw: RawImages, mistakes: &mut Mistakes) -> ImagesConfig {
    for (host, mirror) in &raw.mirrors {
        if host.is_empty() || host.contains('/') {
            mistakes.add("images.mirrors", format!("{host:?} is not the host of a registry"));
        }
        if !mirror.starts_with("http://") && !mirror.starts_with("https://") {
            mistakes.add("images.mirrors", format!("{mirror:?} (for {host}) is not an http:// or https:// URL"));
        }
    }
    ImagesConfig {
        mirrors: raw.mirrors,
        certs_directory: mistakes.absolute(
            "images.certs_directory",
            raw.certs_directory.unwrap_or_else(|| "/etc/containerd/certs.d".into()),
        ),
        preload: raw.preload.map(|path| mistakes.absolute("images.preload", path)),
        max_layer_bytes: mistakes.within("images.max_layer_mib", raw.max_layer_mib.unwrap_or(16 * 1024), 1, 1 << 24)
            * MIB,
        concurrent_layers: mistakes.within("images.concurrent_layers", raw.concurrent_layers.unwrap_or(3).into(), 1, 64)
            as usize,
        concurrent_layers_total: mistakes.within(
            "images.concurrent_layers_total",
            raw.concurrent_layers_total.unwrap_or(6).into(),
            1,
            256,
        ) as usize,
        progress_timeout: Duration::from_secs(mistakes.within(
            "images.progress_timeout_seconds",
            raw.progress_timeout_seconds.unwrap_or(60),
            1,
            3600,
        )),
    }
}

fn check_network(raw: RawNetwork, mistakes: &mut Mistakes) -> NetworkConfig {
    let bridge = raw.bridge.unwrap_or_else(|| "isopod0".to_owned());
    // IFNAMSIZ is 16 bytes with its NUL.
    if bridge.is_empty()
        || bridge.len() > 15
        || !bridge.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        || bridge.starts_with('.')
    {
        mistakes.add("network.bridge", format!("{bridge:?} is not a name of an interface (1 to 15 plain characters)"));
    }
    let subnet = raw.subnet.unwrap_or_else(|| "10.88.0.0/16".to_owned());
    let (subnet, prefix) = match parse_subnet(&subnet) {
        Ok(parsed) => parsed,
        Err(problem) => {
            mistakes.add("network.subnet", format!("{subnet:?} {problem}"));
            (Ipv4Addr::UNSPECIFIED, 24)
        }
    };
    let subnet6 = raw.subnet6.unwrap_or_else(|| "fd69:736f:706f:64::/64".to_owned());
    let subnet6 = parse_subnet6(&subnet6, prefix).unwrap_or_else(|problem| {
        mistakes.add("network.subnet6", format!("{subnet6:?} {problem}"));
        Ipv6Net::default()
    });
    NetworkConfig {
        bridge,
        subnet,
        prefix,
        subnet6,
        mtu: mistakes.within("network.mtu", raw.mtu.unwrap_or(1500).into(), 576, 65_000) as u32,
        masquerade: raw.masquerade.unwrap_or(true),
    }
}

fn check_cni(raw: RawCni, mistakes: &mut Mistakes) -> CniConfig {
    let directories = raw.plugin_directories.unwrap_or_else(|| vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()]);
    for directory in directories.iter().filter(|directory| directory.as_os_str().as_encoded_bytes().contains(&b':')) {
        mistakes.add("cni.plugin_directories", format!("{directory:?} has a ':', which would end it in CNI_PATH"));
    }
    CniConfig {
        config_directory: mistakes
            .absolute("cni.config_directory", raw.config_directory.unwrap_or_else(|| "/etc/cni/net.d".into())),
        plugin_directories: directories
            .into_iter()
            .map(|directory| mistakes.absolute("cni.plugin_directories", directory))
            .collect(),
        deadline: Duration::from_secs(mistakes.within(
            "cni.deadline_seconds",
            raw.deadline_seconds.unwrap_or(30),
            1,
            100,
        )),
    }
}

/// The kubelet is on the same machine, and what it sends and gets is not encrypted: nobody else is to reach it.
fn check_streaming(raw: RawStreaming, mistakes: &mut Mistakes) -> StreamingConfig {
    let text = raw.address.unwrap_or_else(|| "127.0.0.1".to_owned());
    let address = text.parse::<IpAddr>().ok().filter(IpAddr::is_loopback);
    if address.is_none() {
        mistakes.add("streaming.address", format!("{text:?} is not an address of the loopback interface"));
    }
    StreamingConfig {
        address: SocketAddr::new(address.unwrap_or(Ipv4Addr::LOCALHOST.into()), raw.port.unwrap_or(0)),
        idle_timeout: Duration::from_secs(mistakes.within(
            "streaming.idle_timeout_seconds",
            raw.idle_timeout_seconds.unwrap_or(4 * 3600),
            1,
            7 * 24 * 3600,
        )),
    }
}

fn parse_subnet(text: &str) -> Result<(Ipv4Addr, u8), &'static str> {
    let form = "is not of the form 10.88.0.0/16";
    let (address, prefix) = text.split_once('/').ok_or(form)?;
    let address: Ipv4Addr = address.parse().map_err(|_| form)?;
    let prefix: u8 = prefix.parse().map_err(|_| form)?;
    if !(8..=29).contains(&prefix) {
        return Err("has a prefix length that is not 8 to 29");
    }
    if address.to_bits() & (u32::MAX >> prefix) != 0 {
        return Err("has bits set behind its prefix");
    }
    Ok((address, prefix))
}

/// The subnet in `text`; each pod's address there has the number of its IPv4 address, of prefix length `prefix4`.
fn parse_subnet6(text: &str, prefix4: u8) -> Result<Ipv6Net, String> {
    let subnet: Ipv6Net =
        text.parse().map_err(|_| "is not of the form fd69:736f:706f:64::/64, a prefix of IPv6 addresses".to_owned())?;
    if subnet.addr() != subnet.network() {
        return Err("has bits set behind its prefix".to_owned());
    }
    let longest = 128 - (32 - prefix4);
    if !(16..=longest).contains(&subnet.prefix_len()) {
        return Err(format!("has a prefix length that is not 16 to {longest} (as many addresses as network.subnet)"));
    }
    let address = subnet.addr();
    if address.is_multicast() || address.is_unicast_link_local() || address.is_loopback() || address.is_unspecified() {
        return Err("is not a prefix of addresses that can be routed, such as those below fd00::/8".to_owned());
    }
    Ok(subnet)
}

#[derive(Default)]
struct Mistakes(Vec<Mistake>);

impl Mistakes {
    fn add(&mut self, field: &'static str, problem: String) {
        self.0.push(Mistake { field, problem });
    }

    fn absolute(&mut self, field: &'static str, path: PathBuf) -> PathBuf {
        if !path.is_absolute() {
            self.add(field, format!("{path:?} is not an absolute path"));
        }
        path
    }

    fn within(&mut self, field: &'static str, value: u64, least: u64, most: u64) -> u64 {
        if !(least..=most).contains(&value) {
            self.add(field, format!("{value} is not between {least} and {most}"));
        }
        value.clamp(least, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("test.toml"))
    }

    #[test]
    fn an_empty_file_is_the_same_as_the_default_file() {
        let (empty, default) = (parse("").expect("valid"), parse(DEFAULT_FILE).expect("valid"));
        assert_eq!(format!("{empty:?}"), format!("{default:?}"));
    }

    #[test]
    fn the_group_of_the_socket_is_a_name_or_a_number_and_can_reach_it() {
        let elsewhere = "socket = \"unix:///run/cri.sock\"\nsocket_group = ";
        assert_eq!(parse(&format!("{elsewhere}4321")).expect("valid").socket_group, Some(4321));
        assert_eq!(parse(&format!("{elsewhere}\"root\"")).expect("valid").socket_group, Some(0));
        assert_eq!(parse("").expect("valid").socket_group, None);
        for bad in [format!("{elsewhere}\"no such group\""), "socket_group = 4321".to_owned()] {
            let Err(ConfigError::Mistakes { mistakes, .. }) = parse(&bad) else { panic!("{bad} is a mistake") };
            assert_eq!(mistakes.iter().map(|mistake| mistake.field).collect::<Vec<_>>(), ["socket_group"]);
        }
    }

    #[test]
    fn every_mistake_is_reported_in_one_run() {
        let text = "socket = \"tcp://x\"\nroot = \"var\"\n[vmm]\nvcpus = 65\n[network]\nsubnet = \"10.88.0.1/16\"\nsubnet6 = \"fe80::/64\"\nmtu = 1\nbridge = \"a/b\"\n[images.mirrors]\n\"docker.io\" = \"localhost:5000\"";
        let Err(ConfigError::Mistakes { mistakes, .. }) = parse(text) else { panic!("it has mistakes") };
        let fields: Vec<_> = mistakes.iter().map(|mistake| mistake.field).collect();
        assert_eq!(
            fields,
            [
                "socket",
                "root",
                "vmm.vcpus",
                "images.mirrors",
                "network.bridge",
                "network.subnet",
                "network.subnet6",
                "network.mtu"
            ]
        );
    }

    #[test]
    fn an_ipv6_subnet_has_room_for_all_pods() {
        assert!(parse_subnet6("fd00::/112", 16).is_ok());
        assert!(parse_subnet6("fd00::/113", 16).expect_err("too small").contains("112"));
        for bad in ["fd00::1/64", "10.0.0.0/8", "ff02::/64", "::/64", "fd00::"] {
            assert!(parse_subnet6(bad, 16).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_streaming_server_is_for_this_machine_alone() {
        assert_eq!(parse("[streaming]\naddress = \"::1\"").expect("valid").streaming.address.to_string(), "[::1]:0");
        for address in ["0.0.0.0", "192.0.2.1", "localhost"] {
            assert!(parse(&format!("[streaming]\naddress = {address:?}")).is_err());
        }
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let error = parse("[vmm]\nkernle = \"/x\"").expect_err("no such field");
        assert!(std::error::Error::source(&error).is_some_and(|source| source.to_string().contains("kernle")));
    }

    #[test]
    fn a_state_directory_too_long_for_a_socket_is_refused() {
        let text = format!("state = \"/{}\"", "x".repeat(MAX_STATE_DIR));
        assert!(matches!(parse(&text), Err(ConfigError::Mistakes { .. })));
    }
}
