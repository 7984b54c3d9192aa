//! What a guest may send: frames with its own MAC and IP addresses, and nothing else.
//!
//! A chain in the netdev family, at the ingress hook of the pod's tap: it sees every frame of the guest before bridge, routing
//! or another namespace does. The kernel looks beyond IPv6 extension headers where a rule names ICMPv6, so that they hide
//! nothing.

use std::fmt::Write;
use std::net::IpAddr;

use super::pod::PodNetwork;

/// Where the frames go that a guest may send.
#[derive(Clone, Copy, Debug)]
pub enum Passage<'a> {
    /// On their way, which is the bridge that the tap is a port of.
    On,
    /// Out of another interface.
    Interface(&'a str),
}

/// Takes away the chain of `tap`, if there is one.
pub fn remove(table: &str, tap: &str) -> String {
    // Making what is there already changes nothing, and lets the deletion succeed.
    format!("add table netdev {table}\nadd chain netdev {table} {tap}\ndelete chain netdev {table} {tap}\n")
}

/// Makes the chain for `tap`, which has to be there: the guest behind it is to send as `network` says. For a tap that has a
/// chain, this follows [`remove`] in the same transaction.
pub fn add(table: &str, tap: &str, network: &PodNetwork, passage: Passage<'_>) -> String {
    let pass = match passage {
        Passage::On => "accept".to_owned(),
        Passage::Interface(name) => format!("fwd to \"{name}\""),
    };
    let mut text = format!(
        "table netdev {table} {{\n\tchain {tap} {{\n\
         \t\ttype filter hook ingress device \"{tap}\" priority 0; policy drop;\n"
    );
    let mut rule = |line: String| {
        let _ = writeln!(text, "\t\t{line}"); // A String takes everything.
    };
    rule(format!("ether saddr != {} drop", network.mac));
    // A VLAN tag would hide the rest from a port that takes it off.
    rule("ether type != { ip, ip6, arp } drop".to_owned());
    let of_family = |v4: bool| network.ips().filter(move |ip| ip.is_ipv4() == v4).collect::<Vec<_>>();
    let (v4, v6) = (of_family(true), of_family(false));
    if !v4.is_empty() {
        let own = set(&v4);
        // To a bridge with route_localnet, a loopback address would be one of the node's.
        rule("ip daddr 127.0.0.0/8 drop".to_owned());
        rule(format!("ip saddr {own} {pass}"));
        // The sender 0.0.0.0 is a probe (RFC 5227, section 2.1.1), which claims nothing.
        let probe_or_own = own.replacen("{ ", "{ 0.0.0.0, ", 1);
        rule(format!(
            "ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether {} arp saddr ip {probe_or_own} {pass}",
            network.mac
        ));
    }
    // A pod's IPv6 without an address from us is its link-local one, of use to nobody.
    if !v6.is_empty() {
        let mut own = v6;
        own.push(network.mac.link_local().into());
        // A pod is no router, and may not send others elsewhere.
        rule("icmpv6 type { nd-router-advert, nd-redirect } drop".to_owned());
        for address in &own {
            let IpAddr::V6(address) = address else { continue };
            // The target is 8 bytes into the message (RFC 4861, section 4.4).
            rule(format!(
                "ip6 saddr {} icmpv6 type nd-neighbor-advert @th,64,128 {:#034x} {pass}",
                set(&own),
                address.to_bits()
            ));
        }
        rule("icmpv6 type nd-neighbor-advert drop".to_owned());
        rule(format!("ip6 saddr {} {pass}", set(&own)));
        // Before an interface has an address: duplicate detection, and joining groups.
        rule(format!("ip6 saddr :: icmpv6 type {{ nd-neighbor-solicit, mld2-listener-report }} {pass}"));
    }
    text.push_str("\t}\n}\n");
    text
}

/// Sends all that comes in at the interface `from` out of `to`.
pub fn forward(table: &str, from: &str, to: &str) -> String {
    let chain = format!("from_{from}");
    format!(
        "table netdev {table} {{\n\tchain {chain} {{\n\
         \t\ttype filter hook ingress device \"{from}\" priority 0;\n\t\tfwd to \"{to}\"\n\t}}\n}}\n"
    )
}

fn set(addresses: &[IpAddr]) -> String {
    let words: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
    format!("{{ {} }}", words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::pod::Mac;
    use super::*;

    fn network(addresses: &[&str]) -> PodNetwork {
        PodNetwork {
            mac: Mac([0x0a, 0x58, 10, 88, 0, 5]),
            addresses: addresses.iter().map(|text| text.parse().expect("valid")).collect(),
            routes: Vec::new(),
            mtu: 1500,
            dns: None,
        }
    }

    #[test]
    fn a_pod_without_ipv6_may_send_none() {
        let text = add("t", "tap", &network(&["10.88.0.5/16"]), Passage::On);
        assert!(text.contains("policy drop") && text.contains("ip saddr { 10.88.0.5 } accept"));
        assert!(!text.contains("ip6 saddr"), "{text}");
    }

    #[test]
    fn advertisements_are_bound_to_each_address() {
        let text = add("t", "tap", &network(&["10.88.0.5/16", "fd00::5/64"]), Passage::Interface("eth0"));
        assert!(text.contains("@th,64,128 0xfd000000000000000000000000000005 fwd to \"eth0\""), "{text}");
        assert!(text.contains("@th,64,128 0xfe8000000000000008580afffe580005 fwd"), "{text}");
        assert!(!text.contains("accept"));
    }
}
