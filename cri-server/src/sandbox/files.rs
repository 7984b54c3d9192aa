//! The contents of the files every container of a pod sees.

use std::fmt::Write;
use std::net::IpAddr;

use crate::cri;
use crate::network::pod::Dns;

/// Most bytes of a resolv.conf that are taken over.
const MAX_RESOLV_CONF: usize = 64 * 1024;

/// /etc/resolv.conf: from the pod's lists, or, where it has none, from what its network says, or else the node's without what
/// only works on the node.
pub fn resolv_conf(pod: Option<&cri::DnsConfig>, network: Option<&Dns>, of_node: &str) -> String {
    match (pod, network) {
        (Some(pod), _) => of_lists(&pod.searches, &pod.servers, &pod.options),
        (None, Some(network)) => {
            let domain = Some(&network.domain).filter(|domain| !domain.is_empty());
            // One keyword would undo the other; the local domain is the one to look in first.
            let searches: Vec<_> = domain.into_iter().chain(&network.search).cloned().collect();
            of_lists(&searches, &network.nameservers, &network.options)
        }
        (None, None) => without_loopback(of_node),
    }
}

fn of_lists(searches: &[String], servers: &[String], options: &[String]) -> String {
    let mut text = String::new();
    if !searches.is_empty() {
        line(&mut text, "search", &searches.join(" "));
    }
    for server in servers {
        line(&mut text, "nameserver", server);
    }
    if !options.is_empty() {
        line(&mut text, "options", &options.join(" "));
    }
    text
}

fn line(text: &mut String, keyword: &str, value: &str) {
    // A line break in a value would make a line of its own.
    let value = value.replace(['\n', '\r'], " ");
    let _ = writeln!(text, "{keyword} {value}"); // A String takes everything.
}

/// A resolver on the node's loopback, such as systemd-resolved's, is not there in the guest.
fn without_loopback(of_node: &str) -> String {
    let mut text = String::new();
    for line in of_node.lines() {
        if text.len() + line.len() >= MAX_RESOLV_CONF {
            break;
        }
        let mut words = line.split_whitespace();
        let is_loopback = words.next() == Some("nameserver")
            && words.next().and_then(|address| address.parse::<IpAddr>().ok()).is_some_and(|ip| ip.is_loopback());
        if !is_loopback {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// /etc/hosts: loopback, and the pod's own name at each of its addresses.
pub fn hosts(hostname: &str, addresses: impl IntoIterator<Item = IpAddr>) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let short = hostname.split('.').next().unwrap_or_default();
    let names = if short == hostname { hostname.to_owned() } else { format!("{hostname} {short}") };
    for address in addresses {
        let _ = writeln!(text, "{address}\t{names}"); // A String takes everything.
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn the_pods_lists_are_all_there_is() {
        let dns = cri::DnsConfig {
            servers: owned(&["10.10.10.10"]),
            searches: owned(&["google.com", "x"]),
            options: owned(&["timeout:8"]),
        };
        let text = resolv_conf(Some(&dns), None, "nameserver 1.1.1.1\n");
        assert_eq!(text, "search google.com x\nnameserver 10.10.10.10\noptions timeout:8\n");
        assert_eq!(resolv_conf(Some(&cri::DnsConfig::default()), Some(&Dns::default()), "nameserver 1.1.1.1\n"), "");
    }

    #[test]
    fn what_the_network_says_is_for_a_pod_that_says_nothing() {
        let network = Dns {
            nameservers: owned(&["10.1.0.1"]),
            domain: "here".to_owned(),
            search: owned(&["there"]),
            options: Vec::new(),
        };
        assert_eq!(resolv_conf(None, Some(&network), "x\n"), "search here there\nnameserver 10.1.0.1\n");
    }

    #[test]
    fn a_value_cannot_add_lines() {
        let dns = cri::DnsConfig { servers: owned(&["1.1.1.1\nnameserver 6.6.6.6"]), ..Default::default() };
        assert_eq!(resolv_conf(Some(&dns), None, "").lines().count(), 1);
    }

    #[test]
    fn the_nodes_own_resolver_is_left_out() {
        let node = "# made by hand\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 9.9.9.9\noptions edns0\n";
        assert_eq!(resolv_conf(None, None, node), "# made by hand\nnameserver 9.9.9.9\noptions edns0\n");
    }

    #[test]
    fn a_pod_knows_its_own_name() {
        let addresses = ["10.88.0.2", "fd00::2"].map(|text| text.parse().expect("valid"));
        let text = hosts("web.example.org", addresses);
        assert!(text.contains("127.0.0.1\tlocalhost"));
        assert!(text.ends_with("10.88.0.2\tweb.example.org web\nfd00::2\tweb.example.org web\n"));
    }
}
