//! Making the guest the pod: clock, identity, network, files, scratch space.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use isopod_proto::ErrorKind;
use isopod_proto::agent::{ConfigurePodRequest, Interface, Route};
use rustix::mount::MountFlags;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::agent::blocking;
use crate::container::write_file;
use crate::disk::Disks;
use crate::error::{Context as _, Error, Result};
use crate::layout::Layout;
use crate::netlink::{Netlink, Prefix};
use crate::sysctl;

/// Longest hostname of Linux (HOST_NAME_MAX).
const MAX_HOSTNAME: usize = 64;
/// Longest name of an interface (IFNAMSIZ without its NUL).
const MAX_INTERFACE_NAME: usize = 15;
/// Size of the pod's /dev/shm if none is asked for.
const DEFAULT_SHM: u64 = 64 * 1024 * 1024;

/// Does everything a [`ConfigurePodRequest`] asks for.
pub async fn configure(layout: &Layout, disks: &Disks, request: &ConfigurePodRequest) -> Result<()> {
    if request.realtime_nanos != 0 {
        set_clock(request.realtime_nanos)?;
    }
    let (layout, request) = (layout.clone(), request.clone());
    let scratch = request.scratch_disk.clone();
    let work = layout.clone();
    blocking(move || {
        set_hostname(&request.hostname)?;
        write_pod_files(&work, &request)?;
        mount_shm(&work, request.shm_size_bytes)?;
        configure_network(&request.interfaces, &request.routes)?;
        let mut sysctls: Vec<_> = request.sysctls.iter().collect();
        sysctls.sort();
        sysctls.into_iter().try_for_each(|(name, value)| sysctl::set(name, value))
    })
    .await?;
    if scratch.is_empty() {
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        rustix::mount::mount("tmpfs", layout.scratch(), "tmpfs", flags, c"mode=0700")
            .context(|| "mount a tmpfs for upper directories")?;
    } else {
        disks.mount_scratch(&scratch).await?;
    }
    for directory in ["containers", "volumes"] {
        let path = layout.scratch().join(directory);
        fs::create_dir_all(&path).context(|| format!("make {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))
            .context(|| format!("chmod {}", path.display()))?;
    }
    Ok(())
}

fn set_clock(nanos: i64) -> Result<()> {
    let time = Timespec { tv_sec: nanos.div_euclid(1_000_000_000), tv_nsec: nanos.rem_euclid(1_000_000_000) };
    clock_settime(ClockId::Realtime, time).context(|| format!("set the clock to {nanos} ns since the epoch"))
}

fn set_hostname(name: &str) -> Result<()> {
    if name.len() > MAX_HOSTNAME || name.contains(['\0', '\n', '/']) {
        return Err(Error::invalid(format!("the hostname {name:?} is not valid")));
    }
    rustix::system::sethostname(name.as_bytes()).context(|| format!("set the hostname to {name:?}"))
}

fn write_pod_files(layout: &Layout, request: &ConfigurePodRequest) -> Result<()> {
    write_file(&layout.pod_file("hostname"), format!("{}\n", request.hostname).as_bytes(), 0o644)?;
    write_file(&layout.pod_file("hosts"), &request.hosts, 0o644)?;
    write_file(&layout.pod_file("resolv.conf"), &request.resolv_conf, 0o644)
}

fn mount_shm(layout: &Layout, size: u64) -> Result<()> {
    let size = if size == 0 { DEFAULT_SHM } else { size };
    let options = std::ffi::CString::new(format!("mode=1777,size={size}")).expect("numbers have no NUL");
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    rustix::mount::mount("shm", layout.shm(), "tmpfs", flags, options.as_c_str())
        .context(|| format!("mount the pod's /dev/shm of {size} bytes"))
}

fn configure_network(interfaces: &[Interface], routes: &[Route]) -> Result<()> {
    let mut netlink = Netlink::open().context(|| "open a netlink socket")?;
    let mut named = Vec::new();
    for interface in interfaces {
        named.push((interface.name.as_str(), configure_interface(&mut netlink, interface)?));
    }
    for route in routes {
        let unknown = || {
            Error::invalid(format!(
                "the route to {:?} names the interface {:?}, which is none of the pod's",
                route.destination, route.interface
            ))
        };
        let (_, index) = named.iter().find(|(name, _)| *name == route.interface).ok_or_else(unknown)?;
        add_route(&mut netlink, route, *index)?;
    }
    Ok(())
}

fn configure_interface(netlink: &mut Netlink, interface: &Interface) -> Result<u32> {
    let Interface { mac, name, addresses, mtu } = interface;
    let valid = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if !(1..=MAX_INTERFACE_NAME).contains(&name.len())
        || !name.bytes().all(valid)
        || matches!(name.as_str(), "." | "..")
    {
        return Err(Error::invalid(format!("the interface name {name:?} is not valid")));
    }
    let index = find_interface(mac)?;
    let text = |what: &str| format!("{what} interface {name} ({mac})");
    netlink.rename(index, name).context(|| text("name the"))?;
    if *mtu > 0 {
        netlink.set_mtu(index, *mtu).context(|| text(&format!("set the MTU to {mtu} of")))?;
    }
    for address in addresses {
        let prefix =
            Prefix::parse(address).ok_or_else(|| Error::invalid(format!("the address {address:?} is not valid")))?;
        netlink.add_address(index, prefix).context(|| text(&format!("add the address {address} to")))?;
    }
    netlink.set_up(index).context(|| text("switch on the"))?;
    Ok(index)
}

/// The index of the interface with this MAC address.
fn find_interface(mac: &str) -> Result<u32> {
    let read = |path: std::path::PathBuf| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let entries = fs::read_dir("/sys/class/net").context(|| "list the network interfaces")?;
    for entry in entries.flatten() {
        let path = entry.path();
        if read(path.join("address")).eq_ignore_ascii_case(mac)
            && let Ok(index) = read(path.join("ifindex")).parse()
        {
            return Ok(index);
        }
    }
    Err(Error::new(ErrorKind::NotFound, format!("there is no network interface with the MAC address {mac:?}")))
}

fn add_route(netlink: &mut Netlink, route: &Route, index: u32) -> Result<()> {
    let Route { destination, gateway, interface } = route;
    let prefix = Prefix::parse(destination)
        .ok_or_else(|| Error::invalid(format!("the route's destination {destination:?} is not valid")))?;
    let via = match gateway.as_str() {
        "" => None,
        text => {
            let bad = || Error::invalid(format!("the gateway {gateway:?} of the route to {destination} is not valid"));
            let address: std::net::IpAddr = text.parse().map_err(|_| bad())?;
            Some(address).filter(|address| address.is_ipv4() == prefix.address.is_ipv4()).ok_or_else(bad).map(Some)?
        }
    };
    netlink
        .add_route(prefix, via, index)
        .context(|| format!("add the route to {destination} by {interface}, gateway {gateway:?}"))
}
