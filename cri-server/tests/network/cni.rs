//! The network by CNI, with the real plugins of containernetworking-plugins, in a network namespace of the test's own.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use isopod_cri_server::cri;
use isopod_cri_server::network::{KnownPod, Network, tap_name};
use serde_json::json;

use super::frames::{self, Tap};
use super::guest::Guest;
use super::{id, moved_into_namespace, network_with, pod_config, run};

/// Where Debian's package puts the plugins.
const PLUGINS: &str = "/usr/lib/cni";

fn skipped(test: &str) -> bool {
    if !Path::new(PLUGINS).join("bridge").exists() {
        println!("skipped: {test} needs containernetworking-plugins");
        return true;
    }
    false
}

fn configure(directory: &tempfile::TempDir, name: &str, version: &str) {
    let addresses = json!({ "type": "host-local", "dataDir": directory.path().join("addresses"),
        "ranges": [[{ "subnet": "10.66.0.0/24" }], [{ "subnet": "fd66::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }, { "dst": "10.99.0.0/16", "gw": "10.66.0.1" }] });
    let mut list = json!({ "cniVersion": version, "name": name, "plugins": [
        { "type": "bridge", "bridge": "cnitest0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "mtu": 1400,
          "ipam": addresses },
        { "type": "portmap", "capabilities": { "portMappings": true } },
        { "type": "firewall" },
        { "type": "tuning", "mac": "0a:58:0a:42:00:77", "sysctl": { "net.ipv4.conf.eth0.log_martians": "1" } },
        { "type": "bandwidth", "capabilities": { "bandwidth": true } },
    ]});
    if version == "0.3.1" {
        // The plugin does not speak it.
        list["plugins"].as_array_mut().expect("a list").retain(|plugin| plugin["type"] != "firewall");
    }
    let folder = directory.path().join("net.d");
    std::fs::create_dir_all(&folder).expect("made");
    std::fs::write(folder.join("10-test.conflist"), list.to_string()).expect("written");
}

fn network(directory: &tempfile::TempDir) -> Network {
    network_with(directory, &directory.path().join("net.d"), PLUGINS)
}

fn config() -> cri::PodSandboxConfig {
    let mapping = |protocol: cri::Protocol| cri::PortMapping {
        protocol: protocol.into(),
        container_port: 80,
        host_port: 12100,
        host_ip: String::new(),
    };
    let mut config = pod_config("pod", &[mapping(cri::Protocol::Tcp)]);
    config.annotations.insert("kubernetes.io/egress-bandwidth".to_owned(), "100M".to_owned());
    config
}

fn ask(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse().expect("an address"), Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn files_of(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_chain_of_plugins_gives_a_guest_its_network_and_takes_it_back() {
    let test = "cni::root_a_chain_of_plugins_gives_a_guest_its_network_and_takes_it_back";
    if skipped(test) || moved_into_namespace(test) {
        return;
    }
    run("ip", &["link", "set", "lo", "up"]);
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let directory = tempfile::tempdir().expect("a directory");
        configure(&directory, "test", version);
        let network = network(&directory);
        network.status().await.expect("ready");
        network.prepare().await.expect("nothing to do");
        let pod = network.attach(&id(1), &config()).await.expect("attached");
        let addresses: Vec<_> = pod.network.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.66.0.2/24", "fd66::2/64"]);
        assert_eq!((pod.network.mtu, pod.network.mac.to_string().as_str()), (1400, "0a:58:0a:42:00:77"));
        let routes: Vec<_> =
            pod.network.routes.iter().map(|route| (route.destination.to_string(), route.gateway)).collect();
        let gateway = |text: &str| Some(text.parse().expect("valid"));
        for route in [
            ("0.0.0.0/0".to_owned(), gateway("10.66.0.1")),
            ("10.99.0.0/16".to_owned(), gateway("10.66.0.1")),
            ("::/0".to_owned(), gateway("fd66::1")),
        ] {
            assert!(routes.contains(&route), "{route:?} in {routes:?}");
        }

        let guest = Guest::behind(pod.tap, &pod.network);
        let listener = guest.run(|| TcpListener::bind("[::]:80").expect("bound"));
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.write_all(b"guest");
            }
        });
        for address in ["10.66.0.2:80", "[fd66::2]:80", "127.0.0.1:12100"] {
            // The bridge's IPv6 address is not used before the kernel has looked for its double.
            let start = Instant::now();
            while !ask(address).is_ok_and(|answer| answer == "guest") {
                assert!(start.elapsed() < Duration::from_secs(20), "{version} {address}: {:?}", ask(address));
            }
        }
        // The other way, and more than fits into one packet.
        let server = TcpListener::bind("10.66.0.1:0").expect("bound");
        let address = server.local_addr().expect("bound").to_string();
        std::thread::spawn(move || server.accept().map(|(mut stream, _)| stream.write_all(&[7; 1 << 20])));
        let read = guest.run(move || {
            let mut stream = TcpStream::connect(address).expect("connected");
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).map(|_| bytes.len())
        });
        assert_eq!(read.expect("read"), 1 << 20);
        // As nobody else.
        guest.command(&["ip", "address", "add", "10.66.0.99/24", "dev", "eth0"]);
        guest.command(&["ip", "route", "replace", "10.66.0.1/32", "dev", "eth0", "src", "10.66.0.99"]);
        assert!(guest.run(|| ask("10.66.0.1:22")).is_err_and(|error| error.kind() == std::io::ErrorKind::TimedOut));
        guest.command(&["ip", "route", "delete", "10.66.0.1/32"]);
        assert!(
            guest.run(|| ask("10.66.0.1:22")).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        );

        let error = network.attach(&id(2), &config()).await.expect_err("the host port is taken");
        assert!(error.to_string().contains("ns/pod"), "{error}");
        network.detach(&id(2)).await.expect("undone");

        // A later daemon checks it, keeps it, and takes it back, though the configuration has gone.
        drop(network);
        let later = self::network(&directory);
        let known = KnownPod { sandbox: id(1), config: config(), network: Some(pod.network.clone()) };
        later.restore(&[known]).await.expect("restored");
        assert_eq!(ask("127.0.0.1:12100").expect("still there"), "guest");
        std::fs::remove_dir_all(directory.path().join("net.d")).expect("removed");
        later.detach(&id(1)).await.expect("detached");
        later.detach(&id(1)).await.expect("nothing to take is a success");
        assert!(ask("127.0.0.1:12100").is_err());
        let taken = files_of(&directory.path().join("addresses/test"));
        assert!(!taken.iter().any(|name| name.starts_with("10.66.") || name.starts_with("fd66")), "{taken:?}");
        assert_eq!(run("ip", &["link", "show", "master", "cnitest0"]), "");
        assert_eq!(
            (files_of(&directory.path().join("state/netns")).len(), files_of(&directory.path().join("root/cni")).len()),
            (0, 0)
        );
        run("ip", &["link", "delete", "cnitest0"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn root_what_fails_half_way_is_undone_and_orphans_are_detached() {
    let test = "cni::root_what_fails_half_way_is_undone_and_orphans_are_detached";
    if skipped(test) || moved_into_namespace(test) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    configure(&directory, "test", "1.0.0");
    let first = network(&directory);
    // A port that portmap does not take, after the bridge has been made: no such address.
    let ours = first.attach(&id(1), &pod_config("kept", &[])).await.expect("attached");
    let orphan = first.attach(&id(2), &pod_config("orphan", &[])).await.expect("attached");
    let vanished = first.attach(&id(3), &pod_config("vanished", &[])).await.expect("attached");
    assert_eq!(files_of(&directory.path().join("state/netns")).len(), 3);
    // As after a reboot: the namespace is gone, the addresses are still taken.
    drop((orphan, vanished));
    run("umount", &["-l", &directory.path().join("state/netns").join(id(3).as_str()).display().to_string()]);
    run("rm", &[&directory.path().join("state/netns").join(id(3).as_str()).display().to_string()]);
    drop(first);
    let later = network(&directory);
    let known = KnownPod { sandbox: id(1), config: pod_config("kept", &[]), network: Some(ours.network.clone()) };
    later.restore(&[known]).await.expect("restored");
    assert_eq!(files_of(&directory.path().join("state/netns")), [id(1).to_string()]);
    let taken = files_of(&directory.path().join("addresses/test"));
    assert_eq!(taken.iter().filter(|name| name.starts_with("10.66.")).count(), 1, "{taken:?}");

    // A configuration that cannot be used is told, and no pod starts on another network instead.
    std::fs::write(directory.path().join("net.d/00-broken.conflist"), "{").expect("written");
    let problem = later.status().await.expect_err("broken");
    assert!(problem.reason == "NetworkPluginNotReady" && problem.message.contains("00-broken"), "{problem:?}");
    let error = later.attach(&id(4), &pod_config("late", &[])).await.expect_err("broken");
    assert!(error.to_string().contains("CNI"), "{error}");
    std::fs::remove_file(directory.path().join("net.d/00-broken.conflist")).expect("removed");
    later.status().await.expect("ready again");

    // Without a configuration it is the built-in network, and back again.
    std::fs::rename(directory.path().join("net.d"), directory.path().join("off")).expect("moved");
    later.status().await.expect("ready");
    let builtin = later.attach(&id(5), &pod_config("builtin", &[])).await.expect("attached");
    assert!(builtin.network.addresses[0].to_string().starts_with("10.77."), "{builtin:?}");
    assert!(run("ip", &["link", "show", "master", "isotest0"]).contains(&tap_name(&id(5))));
    later.detach(&id(5)).await.expect("detached");
    later.detach(&id(1)).await.expect("detached");
}

#[tokio::test]
async fn root_a_guest_on_a_cni_network_sends_only_its_own_addresses() {
    let test = "cni::root_a_guest_on_a_cni_network_sends_only_its_own_addresses";
    if skipped(test) || moved_into_namespace(test) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let network = network(&directory);
    std::fs::create_dir_all(directory.path().join("net.d")).expect("made");
    let plain = json!({ "cniVersion": "1.0.0", "name": "plain", "type": "bridge", "bridge": "cnitest0", "isGateway": true,
        "ipam": { "type": "host-local", "dataDir": directory.path().join("addresses"), "subnet": "10.77.0.0/24" } });
    std::fs::write(directory.path().join("net.d/plain.conf"), plain.to_string()).expect("written");
    let sender = network.attach(&id(1), &pod_config("sender", &[])).await.expect("attached");
    let receiver = network.attach(&id(2), &pod_config("receiver", &[])).await.expect("attached");
    let (out, into) = (Tap(sender.tap), Tap(receiver.tap));
    let mac = sender.network.mac;
    let broadcast = isopod_cri_server::network::pod::Mac([0xff; 6]);
    let own = Ipv4Addr::new(10, 77, 0, 2);
    let frame = |from, address| frames::ethernet(from, broadcast, 0x0806, &frames::arp(from, address));
    let other_mac = isopod_cri_server::network::pod::Mac([2, 0, 0, 0, 0, 9]);
    let end = frame(mac, own);
    out.send_until_received(&end, &into);
    for (bad, what) in [
        (frame(mac, Ipv4Addr::new(10, 77, 0, 1)), "the gateway's ARP"),
        (frame(other_mac, own), "another MAC"),
        (frames::ethernet(mac, broadcast, 0x0800, &frames::ipv4(Ipv4Addr::new(10, 77, 0, 9), own)), "another IPv4"),
    ] {
        out.send(&bad);
        out.send(&end);
        assert!(!into.received_before(&end).contains(&bad), "{what}");
    }
    for pod in [1, 2] {
        network.detach(&id(pod)).await.expect("detached");
    }
}
