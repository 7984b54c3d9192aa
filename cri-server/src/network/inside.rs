//! What the plugins have made of a pod's namespace, and its way on to the guest.
//!
//! The guest takes the place of the namespace's own network stack: what comes in at the pod's interface is forwarded to the tap
//! before the stack sees it, and what the guest sends out of the interface. Both ways are nftables rules at the ingress hooks
//! (`fwd`), which do what a tc filter with a mirred redirection does, after the same checks as in the built-in network and in
//! one transaction with them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};

use super::guard::{self, Passage};
use super::link::Links;
use super::pod::{Mac, PodNetwork, PodRoute};
use super::{NetworkError, nft, setting, tap};
use crate::cni::{INTERFACE, Outcome};

/// The tap's name: in a namespace of its own, so the same for all.
const TAP: &str = "tap0";
const TABLE: &str = "isopod";

/// Joins a new tap to the pod's interface, in the namespace of the calling thread; what the guest is to have, and the tap.
pub async fn join(outcome: Outcome) -> Result<(PodNetwork, OwnedFd), NetworkError> {
    let links = Links::open()?;
    links.bring_up("lo", &[], None).await?;
    let network = read(&links, outcome).await?;
    let tap = tap::open(TAP)?;
    // The namespace's own stack is to say nothing to the guest.
    if setting::has_ipv6() {
        setting::set(Path::new("/proc/sys/net/ipv6/conf").join(TAP).join("disable_ipv6").as_path(), "1")?;
    }
    let script = guard::remove(TABLE, TAP)
        + &guard::add(TABLE, TAP, &network, Passage::Interface(INTERFACE))
        + &guard::forward(TABLE, INTERFACE, TAP);
    nft::run(script).await?;
    links.bring_up(TAP, &[], Some(network.mtu)).await?;
    Ok((network, tap))
}

/// What the pod's interface is like: the truth, whatever of it a result tells.
async fn read(links: &Links, outcome: Outcome) -> Result<PodNetwork, NetworkError> {
    let unusable = |problem: String| NetworkError::Unusable { problem };
    let mut interface = None;
    let mut found = links.handle().link().get().execute();
    while let Some(link) = found.try_next().await.map_err(listing)? {
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
        if name == Some(INTERFACE) {
            interface = Some(link);
        } else if !link.header.flags.contains(LinkFlags::Loopback) && link.header.flags.contains(LinkFlags::Up) {
            let name = name.unwrap_or_default();
            return Err(NetworkError::Unsupported { what: format!("a second interface of a pod ({name})") });
        }
    }
    if let Some(name) = outcome.others.first() {
        return Err(NetworkError::Unsupported { what: format!("a second interface of a pod ({name})") });
    }
    let interface = interface.ok_or_else(|| unusable(format!("there is no {INTERFACE} in the namespace")))?;
    let (mut mac, mut mtu) = (None, None);
    for attribute in interface.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = bytes.try_into().ok().map(Mac),
            LinkAttribute::Mtu(value) => mtu = Some(value),
            _ => {}
        }
    }
    let mac = mac.ok_or_else(|| unusable(format!("{INTERFACE} has no MAC address")))?;
    let mtu = mtu.ok_or_else(|| unusable(format!("{INTERFACE} has no MTU")))?;
    let index = interface.header.index;
    let (connected, routes) = routes(links, index).await?;
    let there = addresses(links, index).await?;
    let mut addresses = Vec::new();
    for ip in &outcome.addresses {
        let address = there.iter().find(|address| address.addr() == *ip);
        let address =
            address.ok_or_else(|| unusable(format!("{INTERFACE} has no address {ip}, which the result has")))?;
        addresses.push(*address);
    }
    addresses.extend(there.iter().filter(|address| !outcome.addresses.contains(&address.addr())));
    for address in &mut addresses {
        // Some plugins take the route to the subnet away; with the subnet's prefix the guest would make it again.
        if !connected.contains(&address.trunc()) {
            *address = IpNet::from(address.addr());
        }
    }
    Ok(PodNetwork { mac, addresses, routes, mtu, dns: outcome.dns })
}

fn listing(source: rtnetlink::Error) -> NetworkError {
    NetworkError::Interface { doing: "read the state of", name: INTERFACE.to_owned(), source }
}

/// The interface's addresses but for IPv6 link-local ones, which an interface gives itself.
async fn addresses(links: &Links, index: u32) -> Result<Vec<IpNet>, NetworkError> {
    let mut found = links.handle().address().get().set_link_index_filter(index).execute();
    let mut addresses = Vec::new();
    while let Some(message) = found.try_next().await.map_err(listing)? {
        let (mut local, mut peer) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => peer = Some(*ip),
                _ => {}
            }
        }
        if let Some(ip) = local.or(peer)
            && !is_link_local(ip)
            && let Ok(address) = IpNet::new(ip, message.header.prefix_len)
        {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// The networks that the interface is connected to because of its addresses, and its other routes of the main table, those
/// without a gateway first, as the gateways are reached by them.
async fn routes(links: &Links, index: u32) -> Result<(BTreeSet<IpNet>, Vec<PodRoute>), NetworkError> {
    let (mut connected, mut routes) = (BTreeSet::new(), Vec::new());
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let mut found = links.handle().route().get(request).execute();
        while let Some(message) = found.try_next().await.map_err(listing)? {
            let Some((route, by_address)) = route(&message, index) else { continue };
            if is_link_local(route.destination.addr()) {
                continue;
            }
            if by_address {
                connected.insert(route.destination);
            } else {
                routes.push(route);
            }
        }
    }
    routes.sort_by_key(|route| route.gateway.is_some());
    Ok((connected, routes))
}

/// A route out of the interface, and whether it is there because of an address.
fn route(message: &RouteMessage, index: u32) -> Option<(PodRoute, bool)> {
    let RouteHeader { address_family, destination_prefix_length, table, protocol, kind, .. } = &message.header;
    if *table != RouteHeader::RT_TABLE_MAIN || *kind != RouteType::Unicast {
        return None;
    }
    let (mut destination, mut gateway, mut out) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(index) => out = Some(*index),
            _ => {}
        }
    }
    if out != Some(index) {
        return None;
    }
    let destination = destination.unwrap_or(match address_family {
        AddressFamily::Inet => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    });
    let destination = IpNet::new(destination, *destination_prefix_length).ok()?;
    let by_address = *protocol == rtnetlink::packet_route::route::RouteProtocol::Kernel && gateway.is_none();
    Some((PodRoute { destination, gateway }, by_address))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}
