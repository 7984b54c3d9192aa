//! Bridge, taps and addresses of the built-in network.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use isopod_cri_server::cri;
use isopod_cri_server::network::pod::Mac;
use isopod_cri_server::network::{Attachment, KnownPod, Network, NetworkError, tap_name};
use isopod_proto::ObjectId;

use super::{id, moved_into_namespace, network, pod_config, reopened, run};

async fn attach(network: &Network, sandbox: &ObjectId) -> Result<Attachment, NetworkError> {
    network.attach(sandbox, &pod_config(sandbox.short(), &[])).await
}

fn known(sandbox: ObjectId, config: cri::PodSandboxConfig, pod: &Attachment) -> KnownPod {
    KnownPod { sandbox, config, network: Some(pod.network.clone()) }
}

/// The pod's IPv4 address.
fn address(pod: &Attachment) -> Ipv4Addr {
    let found = pod.network.ips().find_map(|ip| match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    });
    found.expect("it has one")
}

#[tokio::test]
async fn root_a_pod_gets_a_tap_on_the_bridge_and_loses_it() {
    if moved_into_namespace("builtin::root_a_pod_gets_a_tap_on_the_bridge_and_loses_it") {
        return;
    }
    let (_directory, network) = network();
    let pod = attach(&network, &id(1)).await.expect("attached");
    let addresses: Vec<_> = pod.network.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.77.0.2/29", "fd77::2/64"]);
    let gateways: Vec<_> =
        pod.network.routes.iter().filter_map(|route| route.gateway).map(|ip| ip.to_string()).collect();
    assert_eq!(gateways, ["10.77.0.1", "fd77::1"]);

    let bridge = run("ip", &["-details", "address", "show", "dev", "isotest0"]);
    assert!(bridge.contains("inet 10.77.0.1/29") && bridge.contains("mtu 1400"), "{bridge}");
    assert!(bridge.contains("inet6 fd77::1/64 scope global nodad"), "{bridge}");
    let mac = Mac::of(Ipv4Addr::new(10, 77, 0, 1));
    assert!(bridge.contains(&format!("link/ether {mac}")) && bridge.contains(",UP"), "{bridge}");
    let tap = run("ip", &["-details", "link", "show", "master", "isotest0"]);
    assert!(tap.contains(&tap_name(&id(1))) && tap.contains("mtu 1400") && tap.contains(",UP"), "{tap}");
    assert!(tap.contains("vnet_hdr on") && tap.contains("persist off"), "{tap}");
    assert_eq!(run("cat", &["/proc/sys/net/ipv4/ip_forward"]).trim(), "1");
    assert_eq!(run("cat", &["/proc/sys/net/ipv6/conf/all/forwarding"]).trim(), "1");
    let rules = run("nft", &["list", "ruleset"]);
    assert!(rules.contains("ip saddr 10.77.0.0/29") && rules.contains("ip6 saddr fd77::/64"), "{rules}");
    assert!(rules.contains(&format!("device \"{}\"", tap_name(&id(1)))), "{rules}");

    network.detach(&id(1)).await.expect("detached while the tap is open");
    assert_eq!(run("ip", &["link", "show", "master", "isotest0"]), "");
    assert!(!run("nft", &["list", "ruleset"]).contains(&tap_name(&id(1))));
    network.detach(&id(1)).await.expect("nothing to take is a success");
}

#[tokio::test]
async fn root_a_tap_goes_with_its_last_descriptor() {
    if moved_into_namespace("builtin::root_a_tap_goes_with_its_last_descriptor") {
        return;
    }
    let (_directory, network) = network();
    drop(attach(&network, &id(2)).await.expect("attached").tap);
    assert_eq!(run("ip", &["link", "show", "master", "isotest0"]), "");
    network.detach(&id(2)).await.expect("detached");
}

#[tokio::test]
async fn root_addresses_differ_run_out_and_come_back() {
    if moved_into_namespace("builtin::root_addresses_differ_run_out_and_come_back") {
        return;
    }
    let (_directory, network) = network();
    // A /29 less its network, gateway and broadcast addresses.
    let mut pods = Vec::new();
    for number in 0..5 {
        pods.push(attach(&network, &id(number)).await.expect("an address"));
    }
    let addresses: BTreeSet<Ipv4Addr> = pods.iter().map(address).collect();
    assert_eq!(addresses.len(), 5);
    assert_eq!(addresses.last(), Some(&Ipv4Addr::new(10, 77, 0, 6)));
    let error = attach(&network, &id(5)).await.expect_err("none left");
    assert_eq!(error.kind(), isopod_proto::ErrorKind::ResourceExhausted);
    network.detach(&id(3)).await.expect("detached");
    attach(&network, &id(5)).await.expect("the address of the one that went");
}

#[tokio::test]
async fn root_a_later_daemon_takes_over_the_bridge_and_removes_taps_of_nobody() {
    if moved_into_namespace("builtin::root_a_later_daemon_takes_over_the_bridge_and_removes_taps_of_nobody") {
        return;
    }
    let (directory, first) = network();
    let pods = [attach(&first, &id(1)).await.expect("attached"), attach(&first, &id(2)).await.expect("attached")];
    drop(first);
    let later = reopened(&directory);
    later.prepare().await.expect("there");
    later.restore(&[known(id(1), pod_config("kept", &[]), &pods[0])]).await.expect("cleaned");
    let ports = run("ip", &["link", "show", "master", "isotest0"]);
    assert!(ports.contains(&tap_name(&id(1))) && !ports.contains(&tap_name(&id(2))), "{ports}");
    let third = attach(&later, &id(3)).await.expect("on the bridge that is there");
    assert!(address(&third) != address(&pods[0]));
    let rules = run("nft", &["list", "ruleset"]);
    assert_eq!(rules.matches("chain postrouting").count(), 1, "{rules}");
    assert!(rules.contains(&tap_name(&id(1))) && !rules.contains(&tap_name(&id(2))), "{rules}");
}

#[tokio::test]
async fn root_a_deleted_bridge_is_made_again_for_the_next_pod() {
    if moved_into_namespace("builtin::root_a_deleted_bridge_is_made_again_for_the_next_pod") {
        return;
    }
    let (_directory, network) = network();
    let _first = attach(&network, &id(1)).await.expect("attached");
    run("ip", &["link", "delete", "isotest0"]);
    let _second = attach(&network, &id(2)).await.expect("attached");
    assert!(run("ip", &["link", "show", "master", "isotest0"]).contains(&tap_name(&id(2))));
}
