//! What goes through a pod's tap on the built-in network, in a network namespace of the test's own: frames that a guest may not
//! send, and host ports. A namespace behind the tap plays the guest.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use isopod_cri_server::cri;
use isopod_cri_server::network::pod::{Mac, PodNetwork};
use isopod_cri_server::network::{KnownPod, Network};

use super::frames::{self, Tap};
use super::guest::Guest;
use super::{id, moved_into_namespace, network, pod_config, reopened, run};

const BROADCAST: Mac = Mac([0xff; 6]);

fn ips(network: &PodNetwork) -> (Ipv4Addr, Ipv6Addr) {
    let mut found = (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
    for ip in network.ips() {
        match ip {
            IpAddr::V4(ip) => found.0 = ip,
            IpAddr::V6(ip) => found.1 = ip,
        }
    }
    found
}

/// What a guest may send, and what it may not. Each is sent to all others on the bridge.
fn frames_of(network: &PodNetwork) -> Vec<(&'static str, Vec<u8>, bool)> {
    let ((v4, v6), mac) = (ips(network), network.mac);
    let (v4_other, v6_other) = (Ipv4Addr::new(10, 77, 0, 99), "fd77::99".parse::<Ipv6Addr>().expect("valid"));
    let (other, own) = (Mac([0x0a, 0x58, 10, 77, 0, 99]), mac);
    let ether = |from: Mac, kind: u16, payload: Vec<u8>| frames::ethernet(from, BROADCAST, kind, &payload);
    let ip4 = |from: Mac, source: Ipv4Addr| ether(from, 0x0800, frames::ipv4(source, Ipv4Addr::new(10, 77, 0, 6)));
    let all = "ff02::1".parse().expect("valid");
    let ip6 =
        |source: Ipv6Addr, next: u8, payload: Vec<u8>| ether(own, 0x86dd, frames::ipv6(source, all, next, &payload));
    let arp = |sender: Mac, ip: Ipv4Addr| ether(own, 0x0806, frames::arp(sender, ip));
    let hop_by_hop = |next: u8, payload: Vec<u8>| [vec![next, 0, 1, 4, 0, 0, 0, 0], payload].concat();
    let local = mac.link_local();
    let foreign_local = other.link_local();
    vec![
        ("its own IPv4", ip4(own, v4), true),
        ("another MAC", ip4(other, v4), false),
        ("another IPv4", ip4(own, v4_other), false),
        ("no IPv4 at all", ip4(own, Ipv4Addr::UNSPECIFIED), false),
        ("its own ARP", arp(own, v4), true),
        ("an ARP probe", arp(own, Ipv4Addr::UNSPECIFIED), true),
        ("ARP for another address", arp(own, v4_other), false),
        ("ARP for the gateway", arp(own, Ipv4Addr::new(10, 77, 0, 1)), false),
        ("ARP with another MAC", arp(other, v4), false),
        ("its own IPv6", ip6(v6, 17, vec![0; 8]), true),
        ("its own link-local address", ip6(local, 17, vec![0; 8]), true),
        ("another IPv6", ip6(v6_other, 17, vec![0; 8]), false),
        ("another link-local address", ip6(foreign_local, 17, vec![0; 8]), false),
        ("its own advertisement", ip6(v6, 58, frames::advertisement(v6)), true),
        ("its own link-local advertisement", ip6(local, 58, frames::advertisement(local)), true),
        ("another's advertisement", ip6(v6, 58, frames::advertisement(v6_other)), false),
        ("another's advertisement, hidden", ip6(v6, 0, hop_by_hop(58, frames::advertisement(v6_other))), false),
        ("its own options", ip6(v6, 0, hop_by_hop(17, vec![0; 8])), true),
        ("duplicate detection", ip6(Ipv6Addr::UNSPECIFIED, 58, frames::solicitation(v6)), true),
        ("no IPv6 at all", ip6(Ipv6Addr::UNSPECIFIED, 17, vec![0; 8]), false),
        ("a router advertisement", ip6(local, 58, vec![134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), false),
        ("another protocol", ether(own, 0x88cc, vec![0; 46]), false),
        ("a VLAN", ether(own, 0x8100, [vec![0, 5, 8, 0], frames::ipv4(v4, v4_other)].concat()), false),
    ]
}

#[tokio::test]
async fn root_a_guest_sends_only_its_own_addresses() {
    if moved_into_namespace("traffic::root_a_guest_sends_only_its_own_addresses") {
        return;
    }
    let (_directory, network) = network();
    let sender = network.attach(&id(1), &pod_config("sender", &[])).await.expect("attached");
    let receiver = network.attach(&id(2), &pod_config("receiver", &[])).await.expect("attached");
    let (out, into) = (Tap(sender.tap), Tap(receiver.tap));
    let sentinel = |number: u8| {
        let (v4, _) = ips(&sender.network);
        let mut frame = frames::ethernet(sender.network.mac, BROADCAST, 0x0806, &frames::arp(sender.network.mac, v4));
        *frame.last_mut().expect("not empty") = number;
        frame
    };
    // A port of the bridge forwards from its first moment, but the tap's switching on takes one.
    out.send_until_received(&sentinel(0xff), &into);
    for (number, (what, frame, allowed)) in frames_of(&sender.network).into_iter().enumerate() {
        out.send(&frame);
        let end = sentinel(u8::try_from(number).expect("few"));
        out.send(&end);
        // Where bridged packets pass the node's rules, the padding of a short one is lost.
        let arrived = into.received_before(&end).iter().any(|other| other.len() >= 42 && frame.starts_with(other));
        assert_eq!(arrived, allowed, "{what}: {frame:02x?}");
    }
}

fn mapping(protocol: cri::Protocol, host_ip: &str, host_port: i32, container_port: i32) -> cri::PortMapping {
    cri::PortMapping { protocol: protocol.into(), host_ip: host_ip.to_owned(), host_port, container_port }
}

/// What the server of [`serve`] at `address` says, which is who asks it; an error if there is none.
fn ask(address: &str) -> std::io::Result<String> {
    let address: SocketAddr = address.parse().expect("an address");
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn ask_udp(address: &str) -> std::io::Result<String> {
    let address: SocketAddr = address.parse().expect("an address");
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    socket.connect(address)?;
    socket.send(b"?")?;
    let mut answer = [0; 100];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// Answers everybody at ports 80 with `name` and who asks.
fn serve(guest: &Guest, name: &'static str) {
    let listener = guest.run(|| TcpListener::bind("[::]:80").expect("bound"));
    let socket = guest.run(|| UdpSocket::bind("[::]:80").expect("bound"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().expect("connected").ip().to_canonical();
            let _ = stream.write_all(format!("{name} {peer}").as_bytes());
        }
    });
    std::thread::spawn(move || {
        while let Ok((_, peer)) = socket.recv_from(&mut [0; 100]) {
            let _ = socket.send_to(format!("{name} {}", peer.ip().to_canonical()).as_bytes(), peer);
        }
    });
}

/// A pod with a guest behind its tap.
async fn pod(network: &Network, number: u8, name: &'static str, ports: &[cri::PortMapping]) -> (Guest, PodNetwork) {
    let attached = network.attach(&id(number), &pod_config(name, ports)).await.expect("attached");
    let guest = Guest::behind(attached.tap, &attached.network);
    (guest, attached.network)
}

#[tokio::test(flavor = "multi_thread")]
async fn root_host_ports_lead_to_the_pod_until_it_is_stopped() {
    if moved_into_namespace("traffic::root_host_ports_lead_to_the_pod_until_it_is_stopped") {
        return;
    }
    run("ip", &["link", "set", "lo", "up"]);
    // Somebody outside the node.
    let outside = Guest::beside("10.200.0.1/24", "10.200.0.2/24", "fd99::1/64", "fd99::2/64");
    let (directory, network) = network();
    let ports = [
        mapping(cri::Protocol::Tcp, "", 12000, 80),
        mapping(cri::Protocol::Udp, "", 12000, 80),
        mapping(cri::Protocol::Tcp, "127.0.0.1", 12001, 80),
        mapping(cri::Protocol::Tcp, "10.200.0.1", 12002, 80),
    ];
    let (guest, server) = pod(&network, 1, "server", &ports).await;
    serve(&guest, "server");
    let (client, client_network) = pod(&network, 2, "client", &[]).await;

    // From the node, at loopback and at its own address.
    assert_eq!(ask("127.0.0.1:12000").expect("answered"), "server 10.77.0.1");
    assert_eq!(ask("10.200.0.1:12000").expect("answered"), "server 10.200.0.1");
    assert_eq!(ask_udp("127.0.0.1:12000").expect("answered"), "server 10.77.0.1");
    assert_eq!(ask("[fd99::1]:12000").expect("answered"), "server fd99::1");
    assert_eq!(ask("127.0.0.1:12001").expect("answered"), "server 10.77.0.1");
    assert!(ask("10.200.0.1:12001").is_err(), "another address than asked for");
    assert!(ask("127.0.0.1:12002").is_err(), "another address than asked for");
    // From outside, which the pod sees as it is.
    assert_eq!(outside.run(|| ask("10.200.0.1:12000")).expect("answered"), "server 10.200.0.2");
    assert_eq!(outside.run(|| ask_udp("10.200.0.1:12000")).expect("answered"), "server 10.200.0.2");
    assert_eq!(outside.run(|| ask("[fd99::1]:12000")).expect("answered"), "server fd99::2");
    assert_eq!(outside.run(|| ask_udp("[fd99::1]:12000")).expect("answered"), "server fd99::2");
    assert_eq!(outside.run(|| ask("10.200.0.1:12002")).expect("answered"), "server 10.200.0.2");
    // From another pod, and from the pod itself.
    assert_eq!(client.run(|| ask("10.200.0.1:12000")).expect("answered"), "server 10.77.0.1");
    assert_eq!(guest.run(|| ask("10.200.0.1:12000")).expect("answered"), "server 10.77.0.1");
    // Where bridged packets pass the node's rules, the kernel loses what is translated back onto the same bridge in IPv6.
    let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-ip6tables", "0"); // Not there without br_netfilter.
    assert_eq!(client.run(|| ask("[fd99::1]:12000")).expect("answered"), "server fd77::1");
    // Pod to pod is direct.
    let (v4, v6) = ips(&server);
    let (client_v4, client_v6) = ips(&client_network);
    assert_eq!(client.run(move || ask(&format!("{v4}:80"))).expect("answered"), format!("server {client_v4}"));
    assert_eq!(client.run(move || ask(&format!("[{v6}]:80"))).expect("answered"), format!("server {client_v6}"));

    // The node's loopback addresses are not for pods, though the bridge routes them.
    let listener = TcpListener::bind("127.0.0.1:7777").expect("bound");
    listener.set_nonblocking(true).expect("set");
    client.command(&["ip", "route", "add", "127.0.0.1", "via", "10.77.0.1", "table", "99"]);
    client.command(&["ip", "rule", "add", "to", "127.0.0.1", "table", "99", "priority", "0"]);
    client.command(&["sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1"]);
    assert!(client.run(|| ask("127.0.0.1:7777")).is_err());
    assert!(listener.accept().is_err());

    // Taken, whoever asks; and a daemon that comes back knows it.
    for ports in [[mapping(cri::Protocol::Tcp, "", 12000, 1)], [mapping(cri::Protocol::Tcp, "127.0.0.1", 12000, 1)]] {
        let error = network.attach(&id(3), &pod_config("late", &ports)).await.expect_err("taken");
        assert_eq!(error.to_string(), format!("host port 12000/tcp is in use by pod ns/server (sandbox {})", id(1)));
        network.detach(&id(3)).await.expect("nothing to undo");
    }
    drop(network);
    run("nft", &["flush", "ruleset"]);
    let later = reopened(&directory);
    let known = [
        KnownPod { sandbox: id(1), config: pod_config("server", &ports), network: Some(server) },
        KnownPod { sandbox: id(2), config: pod_config("client", &[]), network: Some(client_network) },
    ];
    later.adopt(&known).await;
    later.prepare().await.expect("prepared");
    later.restore(&known).await.expect("restored");
    assert_eq!(ask("127.0.0.1:12000").expect("answered"), "server 10.77.0.1");
    assert_eq!(run("nft", &["list", "ruleset"]).matches("hook ingress device").count(), 2);
    run("nft", &["flush", "ruleset"]);
    later.status().await.expect("made again");
    assert_eq!(ask("127.0.0.1:12000").expect("answered"), "server 10.77.0.1");
    assert_eq!(run("nft", &["list", "ruleset"]).matches("hook ingress device").count(), 2);
    let late = [mapping(cri::Protocol::Udp, "10.200.0.1", 12000, 1)];
    let error = later.attach(&id(3), &pod_config("late", &late)).await.expect_err("taken");
    assert!(error.to_string().contains("ns/server"), "{error}");

    later.detach(&id(1)).await.expect("detached");
    assert!(ask("127.0.0.1:12000").is_err());
    assert!(!run("nft", &["list", "ruleset"]).contains("12000"));
    let (again, _) = pod(&later, 3, "again", &ports).await;
    serve(&again, "again");
    assert_eq!(ask("127.0.0.1:12000").expect("answered"), "again 10.77.0.1");
    assert_eq!(outside.run(|| ask_udp("10.200.0.1:12000")).expect("answered"), "again 10.200.0.2");
}
