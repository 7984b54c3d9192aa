//! The contents of the files every container of a pod sees.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};

use crate::cri;

/// Most bytes of a resolv.conf that are taken over.
const MAX_RESOLV_CONF: usize = 64 * 1024;

/// /etc/resolv.conf: from the pod's lists, or, where it has none, the node's without what only works on the node.
pub fn resolv_conf(dns: Option<&cri::DnsConfig>, of_node: &str) -> String {
    match dns {
        None => without_loopback(of_node),
        Some(dns) => {
            let mut text = String::new();
            if !dns.searches.is_empty() {
                line(&mut text, "search", &dns.searches.join(" "));
            }
            for server in &dns.servers {
                line(&mut text, "nameserver", server);
            }
            if !dns.options.is_empty() {
                line(&mut text, "options", &dns.options.join(" "));
            }
            text
        }
    }
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

/// /etc/hosts: loopback, and the pod's own name.
pub fn hosts(hostname: &str, address: Ipv4Addr) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let short = hostname.split('.').next().unwrap_or_default();
    let names = if short == hostname { hostname.to_owned() } else { format!("{hostname} {short}") };
    let _ = writeln!(text, "{address}\t{names}"); // A String takes everything.
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
        let text = resolv_conf(Some(&dns), "nameserver 1.1.1.1\n");
        assert_eq!(text, "search google.com x\nnameserver 10.10.10.10\noptions timeout:8\n");
        assert_eq!(resolv_conf(Some(&cri::DnsConfig::default()), "nameserver 1.1.1.1\n"), "");
    }

    #[test]
    fn a_value_cannot_add_lines() {
        let dns = cri::DnsConfig { servers: owned(&["1.1.1.1\nnameserver 6.6.6.6"]), ..Default::default() };
        assert_eq!(resolv_conf(Some(&dns), "").lines().count(), 1);
    }

    #[test]
    fn the_nodes_own_resolver_is_left_out() {
        let node = "# made by hand\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 9.9.9.9\noptions edns0\n";
        assert_eq!(resolv_conf(None, node), "# made by hand\nnameserver 9.9.9.9\noptions edns0\n");
    }

    #[test]
    fn a_pod_knows_its_own_name() {
        let text = hosts("web.example.org", Ipv4Addr::new(10, 88, 0, 2));
        assert!(text.contains("127.0.0.1\tlocalhost"));
        assert!(text.ends_with("10.88.0.2\tweb.example.org web\n"));
    }
}
