//! Host ports: which port of the node is which port of a pod.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use isopod_proto::ObjectId;
use serde::Serialize;

use super::pod::PodNetwork;
use crate::cri;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// A port of the node that is one of a pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Of which protocol.
    pub protocol: Protocol,
    /// At which of the node's addresses; 0.0.0.0 and :: are all of the family, none is all of both.
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
}

impl HostPort {
    /// Whether a packet to the node could be for either.
    pub fn overlaps(&self, other: &Self) -> bool {
        let ips = match (self.host_ip, other.host_ip) {
            (Some(one), Some(two)) => {
                one == two || (one.is_ipv4() == two.is_ipv4() && (one.is_unspecified() || two.is_unspecified()))
            }
            (None, _) | (_, None) => true,
        };
        ips && self.protocol == other.protocol && self.host_port == other.host_port
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, host_port, .. } = self;
        match self.host_ip {
            None => write!(f, "{host_port}/{protocol}"),
            Some(ip) => write!(f, "{}/{protocol}", std::net::SocketAddr::new(ip, *host_port)),
        }
    }
}

/// The host ports among a sandbox's port mappings, or what is wrong with one. A mapping without a host port asks for nothing.
pub fn parse(mappings: &[cri::PortMapping]) -> Result<Vec<HostPort>, String> {
    let mut ports: Vec<HostPort> = Vec::new();
    for mapping in mappings {
        let cri::PortMapping { protocol, container_port, host_port, host_ip } = mapping;
        if *host_port == 0 {
            continue;
        }
        let number = |what: &str, value: i32| {
            u16::try_from(value).ok().filter(|port| *port != 0).ok_or_else(|| format!("{what} {value} is not a port"))
        };
        let port = HostPort {
            protocol: match cri::Protocol::try_from(*protocol) {
                Ok(cri::Protocol::Tcp) => Protocol::Tcp,
                Ok(cri::Protocol::Udp) => Protocol::Udp,
                Ok(cri::Protocol::Sctp) => Protocol::Sctp,
                Err(_) => return Err(format!("{protocol} is not a protocol")),
            },
            host_ip: match host_ip.as_str() {
                "" => None,
                text => {
                    let shown: String = text.chars().take(80).collect();
                    Some(text.parse().map_err(|_| format!("host_ip {shown:?} is not an address"))?)
                }
            },
            host_port: number("host_port", *host_port)?,
            container_port: number("container_port", *container_port)?,
        };
        if ports.contains(&port) {
            continue;
        }
        if let Some(other) = ports.iter().find(|other| other.overlaps(&port)) {
            return Err(format!("host port {port} is asked for twice, once as {other}"));
        }
        ports.push(port);
    }
    Ok(ports)
}

/// What a pod has of the node's ports.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The pod, for people: namespace/name.
    pub pod: String,
    /// What it has of the network; none if that is not known yet.
    pub network: Option<PodNetwork>,
    /// Its host ports.
    pub ports: Vec<HostPort>,
}

impl Claim {
    /// The address of a family that the pod's ports are at.
    pub fn address(&self, v4: bool) -> Option<IpAddr> {
        self.network.as_ref()?.ips().find(|ip| ip.is_ipv4() == v4)
    }
}

/// The pods' claims, by sandbox.
pub type Claims = BTreeMap<ObjectId, Claim>;

/// The pod other than `sandbox` that has one of `wanted` already, and which one.
pub fn conflict<'a>(
    claims: &'a Claims,
    sandbox: &ObjectId,
    wanted: &[HostPort],
) -> Option<(&'a ObjectId, &'a Claim, HostPort)> {
    claims.iter().filter(|(owner, _)| *owner != sandbox).find_map(|(owner, claim)| {
        let taken = claim.ports.iter().find(|taken| wanted.iter().any(|port| port.overlaps(taken)))?;
        Some((owner, claim, *taken))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(protocol: cri::Protocol, host_ip: &str, host_port: i32, container_port: i32) -> cri::PortMapping {
        cri::PortMapping { protocol: protocol.into(), container_port, host_port, host_ip: host_ip.to_owned() }
    }

    fn one(host_ip: &str) -> HostPort {
        parse(&[mapping(cri::Protocol::Tcp, host_ip, 80, 8080)]).expect("valid")[0]
    }

    #[test]
    fn mappings_without_a_host_port_ask_for_nothing() {
        assert_eq!(parse(&[mapping(cri::Protocol::Tcp, "", 0, 80)]), Ok(Vec::new()));
        // critest names the container's port alone, and kubelets may leave it out.
        assert_eq!(parse(&[mapping(cri::Protocol::Udp, "rubbish", 0, 0)]), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_port_is_named() {
        for (host, container) in [(-1, 80), (65_536, 80), (80, 0), (80, 70_000)] {
            assert!(parse(&[mapping(cri::Protocol::Tcp, "", host, container)]).is_err(), "{host} {container}");
        }
        assert!(parse(&[mapping(cri::Protocol::Tcp, "localhost", 80, 80)]).expect_err("a name").contains("localhost"));
        let twice = [mapping(cri::Protocol::Tcp, "", 80, 80), mapping(cri::Protocol::Tcp, "10.0.0.1", 80, 81)];
        assert!(parse(&twice).expect_err("twice").contains("twice"));
        let protocols = [mapping(cri::Protocol::Tcp, "", 80, 80), mapping(cri::Protocol::Udp, "", 80, 80)];
        assert_eq!(parse(&protocols).expect("two ports").len(), 2);
    }

    #[test]
    fn ports_overlap_where_a_packet_could_be_for_either() {
        let overlap = |one_ip: &str, two_ip: &str| one(one_ip).overlaps(&one(two_ip));
        assert!(overlap("", "") && overlap("", "10.0.0.1") && overlap("0.0.0.0", "10.0.0.1") && overlap("", "::1"));
        assert!(!overlap("10.0.0.2", "10.0.0.1") && !overlap("0.0.0.0", "::") && !overlap("0.0.0.0", "fd00::1"));
        let udp = HostPort { protocol: Protocol::Udp, ..one("") };
        assert!(!udp.overlaps(&one("")));
        assert_eq!((one("::1").to_string(), one("").to_string()), ("[::1]:80/tcp".to_owned(), "80/tcp".to_owned()));
    }
}
