//! The built-in network: one bridge whose first addresses are the pods' gateways, a tap for each pod, and nftables rules for
//! masquerading, host ports, and what a guest may send.
//!
//! A pod's IPv6 address has the same number in its subnet as its IPv4 address, so one allocation serves both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use isopod_proto::ObjectId;
use tokio::sync::Mutex;

use super::guard::{self, Passage};
use super::link::Links;
use super::pod::{Mac, PodNetwork, PodRoute};
use super::ports::{Claim, Claims, HostPort, Protocol, conflict};
use super::rules::{self, Site};
use super::{Attachment, KnownPod, NetworkError, is_tap_name, nft, setting, tap, tap_name};
use crate::config::NetworkConfig;
use crate::store::Store;

/// The built-in network.
pub struct Builtin {
    config: NetworkConfig,
    store: Store,
    /// Name of the nftables tables: one for each bridge, so that several daemons can share a node.
    table: String,
    /// Locked while rules are made, so that they are made in the order of the claims.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What was found when bridge, forwarding and rules were made; none before.
    prepared: Option<Families>,
    claims: Claims,
}

/// The IP families that the node has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Families {
    V4,
    Dual,
}

/// Refuses host ports that no rule of this network could serve.
fn servable(ports: &[HostPort]) -> Result<(), NetworkError> {
    let refusal = ports.iter().find_map(|port| {
        if port.protocol == Protocol::Sctp {
            return Some(format!("host port {port}: guests have no SCTP"));
        }
        // Unlike 127.0.0.1, ::1 is never forwarded: there is no route_localnet for IPv6.
        let is_loopback = port.host_ip == Some(Ipv6Addr::LOCALHOST.into());
        is_loopback.then(|| format!("host port {port}: the kernel forwards nothing that was sent to ::1"))
    });
    refusal.map_or(Ok(()), |what| Err(NetworkError::Unsupported { what }))
}

impl Builtin {
    /// The network that `config` describes. Nothing is made before [`Self::prepare`] or the first pod.
    pub fn new(config: NetworkConfig, store: Store) -> Self {
        let table = format!("isopod_{}", config.bridge);
        Self { config, store, table, state: Mutex::default() }
    }

    /// Gives the pod addresses, a tap on the bridge, and its host ports.
    pub async fn attach(
        &self,
        sandbox: &ObjectId,
        pod: &str,
        ports: Vec<HostPort>,
    ) -> Result<Attachment, NetworkError> {
        servable(&ports)?;
        let mut state = self.state.lock().await;
        let families = self.prepare_locked(&mut state).await?;
        if let Some((owner, claim, port)) = conflict(&state.claims, sandbox, &ports) {
            return Err(NetworkError::PortTaken { port, pod: claim.pod.clone(), sandbox: owner.clone() });
        }
        let network = self.allocate(sandbox, families).await?;
        let name = tap_name(sandbox);
        let tap = tap::open(&name)?;
        let table_changes = !ports.is_empty();
        state.claims.insert(sandbox.clone(), Claim { pod: pod.to_owned(), network: Some(network.clone()), ports });
        let mut script = guard::remove(&self.table, &name) + &guard::add(&self.table, &name, &network, Passage::On);
        if table_changes {
            script += &self.rules(&state.claims, families);
        }
        // Before the tap is up: no frame passes it unguarded.
        nft::run(script).await?;
        Links::open()?.join(&name, &self.config.bridge, self.config.mtu).await?;
        Ok(Attachment { network, tap })
    }

    async fn allocate(&self, sandbox: &ObjectId, families: Families) -> Result<PodNetwork, NetworkError> {
        let NetworkConfig { subnet, prefix, subnet6, mtu, .. } = self.config;
        let last = subnet.to_bits() | (u32::MAX >> prefix);
        let (first, last) = (Ipv4Addr::from_bits(subnet.to_bits() + 2), Ipv4Addr::from_bits(last - 1));
        let address = self.store.allocate_address(first, last, sandbox).await.map_err(NetworkError::Address)?;
        let number = address.to_bits() - subnet.to_bits();
        let mut addresses = vec![net(address, prefix)];
        let mut routes = vec![default_route(self.gateway().into())];
        if families == Families::Dual {
            addresses.push(net(nth(subnet6, number), subnet6.prefix_len()));
            routes.push(default_route(nth(subnet6, 1).into()));
        }
        Ok(PodNetwork { mac: Mac::of(address), addresses, routes, mtu, dns: None })
    }

    /// Takes the pod's addresses, tap and host ports back. Nothing to take is a success.
    pub async fn detach(&self, sandbox: &ObjectId) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        let name = tap_name(sandbox);
        // The kernel removes a tap with its last descriptor, so this finds one only if the VMM is not quite gone.
        Links::open()?.remove(&name).await?;
        if let Some(claim) = state.claims.remove(sandbox) {
            let mut script = guard::remove(&self.table, &name);
            if let (false, Some(families)) = (claim.ports.is_empty(), state.prepared) {
                script += &self.rules(&state.claims, families);
            }
            if let Err(error) = nft::run(script).await {
                // They are still there, so that nobody else may have them.
                state.claims.insert(sandbox.clone(), claim);
                return Err(error);
            }
        }
        self.store.release_address(sandbox).await.map_err(NetworkError::Address)
    }

    /// Takes note of the host ports of an earlier daemon's pods, before the rules are made anew.
    pub async fn adopt(&self, known: &[KnownPod]) {
        self.state.lock().await.claims =
            known.iter().filter_map(|pod| Some((pod.sandbox.clone(), pod.claim()?))).collect();
    }

    /// Takes up the pods of an earlier daemon, and removes what it left of others: taps, addresses, rules.
    pub async fn restore(&self, known: &[KnownPod]) -> Result<(), NetworkError> {
        self.adopt(known).await;
        let state = self.state.lock().await;
        let links = Links::open()?;
        for name in &links.ports(&self.config.bridge).await? {
            if is_tap_name(name) && !known.iter().any(|pod| tap_name(&pod.sandbox) == *name) {
                tracing::info!(tap = name, "removing a tap that no sandbox has");
                links.remove(name).await?;
            }
        }
        let sandboxes = known.iter().map(|pod| pod.sandbox.clone()).collect();
        self.store.release_orphans(sandboxes).await.map_err(NetworkError::Address)?;
        let Some(families) = state.prepared else {
            // Nothing is there, or it could not be made; the next pod tries again.
            return Ok(());
        };
        self.make_rules(&state, families).await
    }

    /// Makes all rules anew, those for what guests may send as well.
    async fn make_rules(&self, state: &State, families: Families) -> Result<(), NetworkError> {
        let table = &self.table;
        let taps = Links::open()?.ports(&self.config.bridge).await?;
        let mut script = format!("add table netdev {table}\ndelete table netdev {table}\nadd table netdev {table}\n");
        for (sandbox, claim) in &state.claims {
            let name = tap_name(sandbox);
            if let (true, Some(network)) = (taps.contains(&name), &claim.network) {
                script += &guard::add(table, &name, network, Passage::On);
            }
        }
        nft::run(script + &self.rules(&state.claims, families)).await
    }

    /// Whether a pod could have a network now. Rules that somebody has flushed, as a firewall does when it is loaded anew, are
    /// made again.
    pub async fn status(&self) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        let families = self.prepare_locked(&mut state).await?;
        if nft::run(format!("list table inet {}\n", self.table)).await.is_err() {
            tracing::warn!(table = self.table, "the nftables rules of the pods' network are gone; making them again");
            self.make_rules(&state, families).await?;
        }
        Ok(())
    }

    /// Makes the bridge, forwarding and rules, unless they are there. The daemon does so at its start; each pod asks again.
    pub async fn prepare(&self) -> Result<(), NetworkError> {
        self.prepare_locked(&mut *self.state.lock().await).await.map(drop)
    }

    async fn prepare_locked(&self, state: &mut State) -> Result<Families, NetworkError> {
        let NetworkConfig { bridge, prefix, subnet6, mtu, .. } = &self.config;
        let links = Links::open()?;
        if let Some(families) = state.prepared {
            // Somebody may have deleted the bridge meanwhile.
            if links.exists(bridge).await? {
                return Ok(families);
            }
        }
        let gateway = self.gateway();
        links.make_bridge(bridge, Mac::of(gateway)).await?;
        let families = if setting::has_ipv6() { Families::Dual } else { Families::V4 };
        let mut addresses = vec![net(gateway, *prefix)];
        if families == Families::Dual {
            setting::for_bridge_ipv6(bridge)?;
            addresses.push(net(nth(*subnet6, 1), subnet6.prefix_len()));
        }
        links.bring_up(bridge, &addresses, Some(*mtu)).await?;
        setting::set(Path::new("/proc/sys/net/ipv4/ip_forward"), "1")?;
        // So that the node reaches host ports at 127.0.0.1; the rules keep everybody else from its loopback addresses.
        setting::set(&Path::new("/proc/sys/net/ipv4/conf").join(bridge).join("route_localnet"), "1")?;
        nft::run(self.rules(&state.claims, families)).await?;
        state.prepared = Some(families);
        Ok(families)
    }

    fn rules(&self, claims: &Claims, families: Families) -> String {
        let NetworkConfig { bridge, subnet, prefix, subnet6, masquerade, .. } = &self.config;
        let mut subnets = vec![net(*subnet, *prefix)];
        if families == Families::Dual {
            subnets.push((*subnet6).into());
        }
        rules::table(&Site { table: &self.table, bridge, subnets: &subnets, masquerade: *masquerade }, claims)
    }

    fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.config.subnet.to_bits() + 1)
    }
}

/// The address with this number in the subnet; the configuration leaves room for those of all IPv4 addresses.
fn nth(subnet: Ipv6Net, number: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(subnet.network().to_bits() | u128::from(number))
}

fn net(address: impl Into<IpAddr>, prefix: u8) -> IpNet {
    // The configuration has checked the lengths.
    IpNet::new_assert(address.into(), prefix)
}

fn default_route(gateway: IpAddr) -> PodRoute {
    let destination = match gateway {
        IpAddr::V4(_) => Ipv4Net::default().into(),
        IpAddr::V6(_) => Ipv6Net::default().into(),
    };
    PodRoute { destination, gateway: Some(gateway) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_ports_that_no_rule_can_serve_are_refused_by_name() {
        let port = |protocol, host_ip: &str| HostPort {
            protocol,
            host_ip: host_ip.parse().ok(),
            host_port: 8080,
            container_port: 80,
        };
        assert!(
            servable(&[port(Protocol::Tcp, ""), port(Protocol::Udp, "::"), port(Protocol::Tcp, "127.0.0.1")]).is_ok()
        );
        for (bad, words) in [(port(Protocol::Sctp, ""), "SCTP"), (port(Protocol::Tcp, "::1"), "::1")] {
            assert!(servable(&[bad]).expect_err("refused").to_string().contains(words));
        }
    }
}
