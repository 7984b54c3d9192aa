//! Host ports, both IP families, and what a guest may send, on the built-in network.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use isopod_cri_server::cri;
use isopod_tests::fixture::{Cri, TestPod, eventually, shell};

/// What a TCP server says before it closes the connection.
fn greeting(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse().expect("an address"), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

async fn greets(address: &str) -> anyhow::Result<String> {
    eventually(address, Duration::from_secs(30), async || greeting(address).ok().filter(|text| !text.is_empty())).await
}

fn mapping(protocol: cri::Protocol, host_ip: &str, host_port: i32, container_port: i32) -> cri::PortMapping {
    cri::PortMapping { protocol: protocol.into(), container_port, host_port, host_ip: host_ip.to_owned() }
}

#[tokio::test]
async fn host_ports_lead_to_the_pod_and_to_no_other() -> anyhow::Result<()> {
    let first = TestPod::run("ports-none").await?;
    first.remove().await?;
    let cri = Cri::shared().await?;
    let mut config = TestPod::config("ports");
    config.port_mappings = vec![
        mapping(cri::Protocol::Tcp, "", 12380, 7000),
        mapping(cri::Protocol::Udp, "", 12353, 53),
        mapping(cri::Protocol::Tcp, "127.0.0.1", 12381, 7000),
        mapping(cri::Protocol::Tcp, "", 0, 7001),
    ];
    let name = config.metadata.clone().unwrap_or_default().name;
    let pod = TestPod::run_with(&cri, config.clone()).await?;
    let server = pod.start(shell("server", "while :; do echo hello | nc -l -p 7000; done")).await?;
    assert_eq!(greets("127.0.0.1:12380").await?, "hello\n");
    assert_eq!(greets("10.0.2.15:12380").await?, "hello\n");
    assert_eq!(greets("127.0.0.1:12381").await?, "hello\n");
    assert!(greeting("10.0.2.15:12381").is_err(), "it is asked for at 127.0.0.1 alone");
    // Nothing in the image serves UDP: what comes is counted by the guest's kernel as for a port where nobody listens.
    let unheard = async || -> anyhow::Result<u64> {
        Ok(server.sh("sed -n 's/^Udp: [0-9]* \\([0-9]*\\).*/\\1/p' /proc/net/snmp").await?.trim().parse()?)
    };
    let before = unheard().await?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.send_to(b"x", "127.0.0.1:12353")?;
    let counted = eventually("datagram in the guest", Duration::from_secs(30), async || {
        unheard().await.ok().filter(|count| *count > before)
    });
    assert_eq!(counted.await?, before + 1);

    let mut late = TestPod::config("ports-late");
    late.port_mappings = vec![mapping(cri::Protocol::Tcp, "10.0.2.15", 12380, 80)];
    let error = TestPod::run_with(&cri, late.clone()).await.expect_err("the port is taken").to_string();
    assert!(error.contains("12380") && error.contains(&name), "{error}");
    late.port_mappings = vec![mapping(cri::Protocol::Tcp, "not an address", 12380, 80)];
    let error = TestPod::run_with(&cri, late).await.expect_err("no address").to_string();
    assert!(error.contains("port_mappings") && error.contains("not an address"), "{error}");

    pod.stop().await?;
    assert!(greeting("127.0.0.1:12380").is_err(), "a stopped pod has no ports");
    pod.remove().await?;
    let rules = std::process::Command::new("nft").args(["list", "ruleset"]).output()?;
    assert!(!String::from_utf8_lossy(&rules.stdout).contains("12380"));
    Ok(())
}

#[tokio::test]
async fn a_pod_has_both_families_and_sends_as_nobody_else() -> anyhow::Result<()> {
    let pod = TestPod::run("families").await?;
    let network = pod.status().await?.network.unwrap_or_default();
    let v4: IpAddr = network.ip.parse()?;
    let v6: IpAddr = network.additional_ips.first().map(|ip| ip.ip.as_str()).unwrap_or_default().parse()?;
    assert!(v4.is_ipv4() && v6.is_ipv6(), "{network:?}");
    let mut config = shell("families", "while :; do echo hello | nc -l -p 7000; done");
    let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.capabilities =
        Some(cri::Capability { add_capabilities: vec!["NET_ADMIN".to_owned()], ..Default::default() });
    let container = pod.start(config).await?;
    let seen = container.sh("ip -6 address show dev eth0; ip -6 route").await?;
    assert!(seen.contains(&format!("inet6 {v6}/64 scope global")) && !seen.contains("global tentative"), "{seen}");
    assert_eq!(greets(&format!("[{v6}]:7000")).await?, "hello\n");
    let gateway6 = container.sh("ip -6 route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").await?;
    let listener = TcpListener::bind((gateway6.trim(), 0))?;
    let port = listener.local_addr()?.port();
    let accepted = tokio::task::spawn_blocking(move || -> std::io::Result<IpAddr> {
        let (mut stream, peer) = listener.accept()?;
        stream.write_all(b"from the node\n")?;
        Ok(peer.ip())
    });
    let seen = container.sh(&format!("nc -w 10 {} {port} </dev/null", gateway6.trim())).await?;
    assert_eq!((seen.as_str(), accepted.await??), ("from the node\n", v6));

    // Questions to a name server are UDP packets that the node sees whatever comes of them.
    let gateway = container.sh("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").await?;
    let (gateway, gateway6) = (gateway.trim(), gateway6.trim());
    let node = UdpSocket::bind((gateway, 53))?;
    let node6 = UdpSocket::bind((gateway6, 53))?;
    let script = format!(
        "ask() {{ timeout 4 nslookup $1 $2 >/dev/null 2>&1; true; }}
        ip address add 10.88.200.200/32 dev eth0 && ip route add {gateway}/32 dev eth0 src 10.88.200.200
        ask spoofed.test {gateway}
        ip route del {gateway}/32
        ip -6 address add fd69:736f:706f:64::beef/128 dev eth0 nodad 2>/dev/null || ip -6 address add fd69:736f:706f:64::beef/128 dev eth0
        sleep 2
        ip -6 route add {gateway6}/128 dev eth0 src fd69:736f:706f:64::beef && ask spoofed.test {gateway6}
        ip -6 route del {gateway6}/128
        mac=$(cat /sys/class/net/eth0/address)
        ip link set eth0 down && ip link set eth0 address 02:00:00:00:00:09 && ip link set eth0 up
        ask disguised.test {gateway}
        ip link set eth0 down && ip link set eth0 address $mac && ip link set eth0 up
        ip route add default via {gateway} 2>/dev/null
        ask own.test {gateway}; ask own.test {gateway6}; ip address"
    );
    let work = tokio::task::spawn_blocking(move || (collect(&node), collect(&node6)));
    let state = container.sh(&script).await?;
    let (seen, seen6) = work.await?;
    assert!(seen.iter().any(|(peer, _)| *peer == v4), "the pod's own packets arrive: {seen:?} {state}");
    for (peer, name) in seen.iter().chain(&seen6) {
        assert!((*peer == v4 || *peer == v6) && name == "own", "{peer} asked for {name}");
    }
    pod.remove().await?;
    Ok(())
}

/// Who asks for which name, until a second after the first question for "own", at most half a minute.
fn collect(socket: &UdpSocket) -> Vec<(IpAddr, String)> {
    let mut seen = Vec::new();
    let mut end = Instant::now() + Duration::from_secs(60);
    let mut buffer = [0; 600];
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        let _ = socket.set_read_timeout(Some(left)); // It is not zero.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        // The name's first label: a length at byte 12, and so many characters.
        let label = buffer[..length].get(12).map_or(0, |count| usize::from(*count));
        let name = buffer[..length].get(13..13 + label).map(|name| String::from_utf8_lossy(name).into_owned());
        let name = name.unwrap_or_default();
        if name == "own" {
            end = end.min(Instant::now() + Duration::from_secs(1));
        }
        seen.push((peer.ip(), name));
    }
    seen
}
