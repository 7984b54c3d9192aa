//! The built-in pod network, in a network namespace of the test's own.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::Command;

use isopod_cri_server::config::{Config, NetworkConfig, RawConfig, RawNetwork};
use isopod_cri_server::network::{Network, mac_of, tap_name};
use isopod_cri_server::store::Store;
use isopod_proto::ObjectId;

const INSIDE: &str = "ISOPOD_TEST_IN_NAMESPACE";

/// Runs the calling test in a new network namespace. False in there, where the test is to go on.
fn moved_into_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: {test} needs root");
        return true;
    }
    let output = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().expect("our own path"))
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    true
}

fn config() -> NetworkConfig {
    let network = RawNetwork {
        bridge: Some("isotest0".to_owned()),
        subnet: Some("10.77.0.0/29".to_owned()),
        mtu: Some(1400),
        masquerade: Some(true),
    };
    Config::check(RawConfig { network, ..RawConfig::default() }).expect("valid").network
}

fn network() -> (tempfile::TempDir, Network) {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(&directory.path().join("state.redb")).expect("a database");
    (directory, Network::new(config(), store))
}

fn id(byte: u8) -> ObjectId {
    ObjectId::from_random([byte; 32])
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("it runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn root_a_pod_gets_a_tap_on_the_bridge_and_loses_it() {
    if moved_into_namespace("root_a_pod_gets_a_tap_on_the_bridge_and_loses_it") {
        return;
    }
    let (_directory, network) = network();
    let pod = network.attach(&id(1)).await.expect("attached");
    assert_eq!(pod.address, Ipv4Addr::new(10, 77, 0, 2));

    let bridge = run("ip", &["-details", "address", "show", "dev", "isotest0"]);
    assert!(bridge.contains("inet 10.77.0.1/29") && bridge.contains("mtu 1400"), "{bridge}");
    let mac: Vec<String> = mac_of(Ipv4Addr::new(10, 77, 0, 1)).iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(bridge.contains(&format!("link/ether {}", mac.join(":"))) && bridge.contains(",UP"), "{bridge}");
    let tap = run("ip", &["-details", "link", "show", "master", "isotest0"]);
    assert!(tap.contains(&tap_name(&id(1))) && tap.contains("mtu 1400") && tap.contains(",UP"), "{tap}");
    assert!(tap.contains("vnet_hdr on") && tap.contains("persist off"), "{tap}");
    assert_eq!(run("cat", &["/proc/sys/net/ipv4/ip_forward"]).trim(), "1");
    let rules = run("nft", &["list", "ruleset"]);
    assert!(rules.contains("ip saddr 10.77.0.0/29") && rules.contains("masquerade"), "{rules}");

    network.detach(&id(1)).await.expect("detached while the tap is open");
    assert_eq!(run("ip", &["link", "show", "master", "isotest0"]), "");
    network.detach(&id(1)).await.expect("nothing to take is a success");
}

#[tokio::test]
async fn root_a_tap_goes_with_its_last_descriptor() {
    if moved_into_namespace("root_a_tap_goes_with_its_last_descriptor") {
        return;
    }
    let (_directory, network) = network();
    drop(network.attach(&id(2)).await.expect("attached").tap);
    assert_eq!(run("ip", &["link", "show", "master", "isotest0"]), "");
    network.detach(&id(2)).await.expect("detached");
}

#[tokio::test]
async fn root_addresses_differ_run_out_and_come_back() {
    if moved_into_namespace("root_addresses_differ_run_out_and_come_back") {
        return;
    }
    let (_directory, network) = network();
    // A /29 less its network, gateway and broadcast addresses.
    let mut pods = Vec::new();
    for number in 0..5 {
        pods.push(network.attach(&id(number)).await.expect("an address"));
    }
    let addresses: BTreeSet<Ipv4Addr> = pods.iter().map(|pod| pod.address).collect();
    assert_eq!(addresses.len(), 5);
    assert_eq!(addresses.last(), Some(&Ipv4Addr::new(10, 77, 0, 6)));
    let error = network.attach(&id(5)).await.expect_err("none left");
    assert_eq!(error.kind(), isopod_proto::ErrorKind::ResourceExhausted);
    network.detach(&id(3)).await.expect("detached");
    network.attach(&id(5)).await.expect("the address of the one that went");
}

#[tokio::test]
async fn root_a_later_daemon_takes_over_the_bridge_and_removes_taps_of_nobody() {
    if moved_into_namespace("root_a_later_daemon_takes_over_the_bridge_and_removes_taps_of_nobody") {
        return;
    }
    let (directory, first) = network();
    let pods = [first.attach(&id(1)).await.expect("attached"), first.attach(&id(2)).await.expect("attached")];
    drop(first);
    let store = Store::open(&directory.path().join("state.redb")).expect("the database");
    let later = Network::new(config(), store);
    later.remove_orphans(&[id(1)]).await.expect("cleaned");
    let ports = run("ip", &["link", "show", "master", "isotest0"]);
    assert!(ports.contains(&tap_name(&id(1))) && !ports.contains(&tap_name(&id(2))), "{ports}");
    let third = later.attach(&id(3)).await.expect("on the bridge that is there");
    assert!(third.address != pods[0].address);
    assert_eq!(run("nft", &["list", "ruleset"]).matches("masquerade").count(), 1);
}

#[tokio::test]
async fn root_a_deleted_bridge_is_made_again_for_the_next_pod() {
    if moved_into_namespace("root_a_deleted_bridge_is_made_again_for_the_next_pod") {
        return;
    }
    let (_directory, network) = network();
    let _first = network.attach(&id(1)).await.expect("attached");
    run("ip", &["link", "delete", "isotest0"]);
    let _second = network.attach(&id(2)).await.expect("attached");
    assert!(run("ip", &["link", "show", "master", "isotest0"]).contains(&tap_name(&id(2))));
}
