//! The built-in network's nftables table of the inet family: masquerading and host ports.
//!
//! The table is made anew from what the pods have, in one transaction: so nothing in it can be left over, and connections that
//! are there go on, as the kernel keeps their translations elsewhere.

use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;

use super::ports::{Claims, HostPort};

/// What the rules depend on besides the pods.
pub struct Site<'a> {
    /// The table's name.
    pub table: &'a str,
    /// The bridge's.
    pub bridge: &'a str,
    /// The pods' subnets.
    pub subnets: &'a [IpNet],
    /// Whether what pods send out of them gets the node's address.
    pub masquerade: bool,
}

/// The script that makes the table what `claims` say.
pub fn table(site: &Site<'_>, claims: &Claims) -> String {
    let Site { table, bridge, .. } = site;
    // Naming the table before deleting it makes the deletion valid where there is none.
    let mut text = format!("add table inet {table}\ndelete table inet {table}\ntable inet {table} {{\n");
    let mut line = |line: String| {
        let _ = writeln!(text, "\t{line}"); // A String takes everything.
    };
    let dnat = Dnat::of(claims);
    dnat.maps(&mut line);
    line("chain ports {".to_owned());
    dnat.rules(&mut line);
    line("}".to_owned());
    line("chain prerouting {".to_owned());
    line("\ttype nat hook prerouting priority -100;".to_owned());
    line("\tfib daddr type local jump ports".to_owned());
    line("}".to_owned());
    // What the node itself sends does not pass the prerouting hook.
    line("chain output {".to_owned());
    line("\ttype nat hook output priority -100;".to_owned());
    line("\tfib daddr type local jump ports".to_owned());
    line("}".to_owned());
    // The bridge routes packets from the node's loopback addresses (route_localnet), so nobody else may use these.
    line("chain loopback {".to_owned());
    line("\ttype filter hook prerouting priority -300;".to_owned());
    line(format!("\tiifname \"{bridge}\" ip daddr 127.0.0.0/8 drop"));
    line("}".to_owned());
    line("chain postrouting {".to_owned());
    line("\ttype nat hook postrouting priority 100;".to_owned());
    // A pod would answer another pod directly, and loopback addresses never: both connections came by a host port.
    line(format!("\toifname \"{bridge}\" ct status dnat ip saddr 127.0.0.0/8 masquerade"));
    for subnet in site.subnets {
        let family = if subnet.addr().is_ipv4() { "ip" } else { "ip6" };
        line(format!("\toifname \"{bridge}\" ct status dnat {family} saddr {subnet} masquerade"));
        if site.masquerade {
            let outside = format!("{family} daddr != {subnet}");
            line(format!("\toifname != \"{bridge}\" {family} saddr {subnet} {outside} masquerade"));
        }
    }
    line("}".to_owned());
    text.push_str("}\n");
    text
}

/// The host ports as the elements of maps: [IPv4, IPv6] each.
#[derive(Default)]
struct Dnat {
    /// At one address of the node.
    own: [Vec<String>; 2],
    /// At all.
    any: [Vec<String>; 2],
}

const FAMILIES: [(&str, &str); 2] = [("ip", "ipv4_addr"), ("ip6", "ipv6_addr")];

impl Dnat {
    fn of(claims: &Claims) -> Self {
        let mut dnat = Self::default();
        for claim in claims.values() {
            for port in &claim.ports {
                for family in [0, 1] {
                    if let Some(pod) = claim.address(family == 0) {
                        dnat.add(port, family, pod);
                    }
                }
            }
        }
        dnat
    }

    fn add(&mut self, port: &HostPort, family: usize, pod: IpAddr) {
        let HostPort { protocol, host_ip, host_port, container_port } = port;
        let target = format!("{protocol} . {host_port} : {pod} . {container_port}");
        match host_ip {
            Some(ip) if ip.is_ipv4() != (family == 0) => {}
            Some(ip) if !ip.is_unspecified() => self.own[family].push(format!("{ip} . {target}")),
            Some(_) | None => self.any[family].push(target),
        }
    }

    fn maps(&self, line: &mut impl FnMut(String)) {
        for (family, (name, address)) in FAMILIES.iter().enumerate() {
            let target = format!("{address} . inet_service");
            for (map, key, elements) in [
                ("own", format!("{address} . inet_proto . inet_service"), &self.own[family]),
                ("any", "inet_proto . inet_service".to_owned(), &self.any[family]),
            ] {
                if !elements.is_empty() {
                    line(format!("map {map}_{name} {{"));
                    line(format!("\ttype {key} : {target}"));
                    line(format!("\telements = {{ {} }}", elements.join(", ")));
                    line("}".to_owned());
                }
            }
        }
    }

    fn rules(&self, line: &mut impl FnMut(String)) {
        let lookup = "meta l4proto { tcp, udp, sctp } dnat";
        for (family, (name, _)) in FAMILIES.iter().enumerate() {
            if !self.own[family].is_empty() {
                line(format!("\t{lookup} {name} to {name} daddr . meta l4proto . th dport map @own_{name}"));
            }
        }
        for (family, (name, _)) in FAMILIES.iter().enumerate() {
            if !self.any[family].is_empty() {
                line(format!(
                    "\tmeta nfproto {} {lookup} {name} to meta l4proto . th dport map @any_{name}",
                    ["ipv4", "ipv6"][family]
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use isopod_proto::ObjectId;

    use super::super::pod::{Mac, PodNetwork};
    use super::super::ports::{Claim, Protocol};
    use super::*;

    fn site(subnets: &[IpNet]) -> Site<'_> {
        Site { table: "isopod_br0", bridge: "br0", subnets, masquerade: true }
    }

    #[test]
    fn rules_name_the_subnets_and_the_bridge() {
        let subnets = ["10.88.0.0/16".parse().expect("valid"), "fd00::/64".parse().expect("valid")];
        let text = table(&site(&subnets), &Claims::new());
        assert!(
            text.contains("oifname != \"br0\" ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 masquerade"),
            "{text}"
        );
        assert!(text.contains("oifname != \"br0\" ip6 saddr fd00::/64 ip6 daddr != fd00::/64 masquerade"), "{text}");
        assert!(text.find("delete table").expect("replaced") < text.find("chain").expect("made"));
        assert!(!text.contains("map"), "an empty map is not made: {text}");
    }

    #[test]
    fn a_port_goes_to_the_pods_address_of_each_family_it_is_asked_for() {
        let port = |host_ip: Option<&str>, host_port| HostPort {
            protocol: Protocol::Tcp,
            host_ip: host_ip.map(|text| text.parse().expect("valid")),
            host_port,
            container_port: 80,
        };
        let network = PodNetwork {
            mac: Mac([2, 0, 0, 0, 0, 1]),
            addresses: ["10.88.0.2/16", "fd00::2/64"].map(|text| text.parse().expect("valid")).into(),
            routes: Vec::new(),
            mtu: 1500,
            dns: None,
        };
        let claim = Claim {
            pod: "ns/name".to_owned(),
            network: Some(network),
            ports: vec![port(None, 1), port(Some("127.0.0.1"), 2), port(Some("0.0.0.0"), 3), port(Some("::"), 4)],
        };
        let claims = Claims::from([(ObjectId::from_random([1; 32]), claim)]);
        let text = table(&site(&[]), &claims);
        assert!(text.contains("elements = { tcp . 1 : 10.88.0.2 . 80, tcp . 3 : 10.88.0.2 . 80 }"), "{text}");
        assert!(text.contains("elements = { tcp . 1 : fd00::2 . 80, tcp . 4 : fd00::2 . 80 }"), "{text}");
        assert!(text.contains("elements = { 127.0.0.1 . tcp . 2 : 10.88.0.2 . 80 }"), "{text}");
    }
}
