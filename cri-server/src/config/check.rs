//! From what the configuration file says to a configuration that can be used: defaults, bounds, and every mistake at once.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::Ipv6Net;

use super::{
    CniConfig, Config, ImagesConfig, Mistake, NetworkConfig, RawCni, RawConfig, RawGroup, RawImages, RawNetwork,
    RawStreaming, RawVmm, StreamingConfig, UserRange, VmmConfig,
};
use crate::cgroup;

const MIB: u64 = 1024 * 1024;
/// `sockaddr_un.sun_path` is 108 bytes with its NUL; below the state directory go "/sandboxes/<12 digits>/control.sock".
pub(super) const MAX_STATE_DIR: usize = 107 - "/sandboxes/0123456789ab/control.sock".len();

impl Config {
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
            cgroup_driver: raw.cgroup_driver.unwrap_or_else(cgroup::Driver::of_host),
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
        max_vcpus: raw.max_vcpus.map(|count| mistakes.within("vmm.max_vcpus", count.into(), 1, 64) as u32),
        max_memory_bytes: raw.max_memory_mib.map(|mib| mistakes.within("vmm.max_memory_mib", mib, 64, 1 << 22) * MIB),
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

pub(super) fn parse_subnet(text: &str) -> Result<(Ipv4Addr, u8), &'static str> {
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
pub(super) fn parse_subnet6(text: &str, prefix4: u8) -> Result<Ipv6Net, String> {
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
