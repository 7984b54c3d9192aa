//! Networks by CNI: the real plugins, chained, and a daemon that is restarted with another configuration.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Cri, Daemon, TestPod, eventually, shell};
use rustix::process::Signal;
use serde_json::json;

async fn greets(address: &str) -> anyhow::Result<String> {
    eventually(address, Duration::from_secs(30), async || {
        let mut stream = TcpStream::connect_timeout(&address.parse().ok()?, Duration::from_secs(5)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text).filter(|text| !text.is_empty())
    })
    .await
}

/// The NetworkReady condition.
async fn network_ready(cri: &Cri) -> anyhow::Result<cri::RuntimeCondition> {
    let answer = cri.runtime.clone().status(cri::StatusRequest::default()).await?.into_inner();
    let conditions = answer.status.unwrap_or_default().conditions;
    conditions.into_iter().find(|one| one.r#type == "NetworkReady").ok_or_else(|| anyhow::anyhow!("no NetworkReady"))
}

fn configure(directory: &Path) -> anyhow::Result<()> {
    let addresses = json!({ "type": "host-local", "dataDir": directory.join("addresses"),
        "ranges": [[{ "subnet": "10.66.0.0/24" }], [{ "subnet": "fd66::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] });
    let list = json!({ "cniVersion": "1.0.0", "name": "e2e", "plugins": [
        { "type": "bridge", "bridge": "cnie2e0", "isGateway": true, "ipMasq": true, "mtu": 1400, "ipam": addresses,
          "dns": { "nameservers": ["10.66.0.53"], "search": ["cni.test"] } },
        { "type": "portmap", "capabilities": { "portMappings": true } },
        { "type": "firewall" },
        { "type": "tuning", "mac": "0a:58:0a:42:00:77" },
        { "type": "bandwidth", "capabilities": { "bandwidth": true } },
    ]});
    std::fs::create_dir_all(directory.join("net.d"))?;
    Ok(std::fs::write(directory.join("net.d/10-e2e.conflist"), list.to_string())?)
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test]
async fn plugins_make_a_pods_network_and_undo_it() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let net_d = directory.path().join("net.d");
    let mut daemon = Daemon::start(|config| {
        let mut cni = toml::Table::new();
        cni.insert("config_directory".into(), net_d.display().to_string().into());
        config.insert("cni".into(), cni.into());
    })
    .await?;
    let cri = daemon.cri().await?;
    assert!(network_ready(&cri).await?.status, "the built-in network is ready");
    std::fs::create_dir_all(&net_d)?;
    std::fs::write(net_d.join("10-e2e.conflist"), "{")?;
    let condition = network_ready(&cri).await?;
    assert!(!condition.status && condition.reason == "NetworkPluginNotReady", "{condition:?}");
    assert!(condition.message.contains("10-e2e.conflist"), "{condition:?}");
    let error = TestPod::run_with(&cri, TestPod::config("broken")).await.expect_err("no network").to_string();
    assert!(error.contains("10-e2e.conflist"), "{error}");
    configure(directory.path())?;
    let condition = network_ready(&cri).await?;
    assert!(condition.status, "{condition:?}");

    cri.pull(BUSYBOX).await?;
    let mut config = TestPod::config("cni");
    config.port_mappings.push(cri::PortMapping {
        protocol: cri::Protocol::Tcp.into(),
        container_port: 7000,
        host_port: 12480,
        host_ip: String::new(),
    });
    let pod = TestPod::run_with(&cri, config.clone()).await?;
    let network = pod.status().await?.network.unwrap_or_default();
    let second: Vec<_> = network.additional_ips.iter().map(|ip| ip.ip.as_str()).collect();
    assert_eq!((network.ip.as_str(), second.as_slice()), ("10.66.0.2", ["fd66::2"].as_slice()));
    let container = pod.start(shell("cni", "while :; do echo hello | nc -l -p 7000; done")).await?;
    for address in ["10.66.0.2:7000", "[fd66::2]:7000", "127.0.0.1:12480", "10.0.2.15:12480"] {
        assert_eq!(greets(address).await?, "hello\n", "{address}");
    }
    let seen = container.sh("ip address show dev eth0; ip route; ip -6 route; cat /etc/resolv.conf /etc/hosts").await?;
    for part in [
        "inet 10.66.0.2/24",
        "inet6 fd66::2/64",
        "mtu 1400",
        "0a:58:0a:42:00:77",
        "default via 10.66.0.1",
        "default via fd66::1",
        "nameserver 10.66.0.53",
        "search cni.test",
        "fd66::2\t",
    ] {
        assert!(seen.contains(part), "{part} in {seen}");
    }
    let listener = TcpListener::bind("10.66.0.1:0")?;
    let port = listener.local_addr()?.port();
    let accepted = tokio::task::spawn_blocking(move || -> std::io::Result<String> {
        let (mut stream, peer) = listener.accept()?;
        stream.write_all(&[b'x'; 1 << 20])?;
        Ok(peer.ip().to_string())
    });
    assert_eq!(container.sh(&format!("nc -w 20 10.66.0.1 {port} </dev/null | wc -c")).await?.trim(), "1048576");
    assert_eq!(accepted.await??, "10.66.0.2");
    let mut late = TestPod::config("late");
    late.port_mappings.clone_from(&config.port_mappings);
    let error = TestPod::run_with(&cri, late).await.expect_err("the port is taken").to_string();
    let name = config.metadata.clone().unwrap_or_default().name;
    assert!(error.contains("12480") && error.contains(&name), "{error}");

    // The pod stays on its network, and is taken off it, whatever the daemon that comes back is configured for.
    std::fs::remove_dir_all(&net_d)?;
    daemon.end(Signal::KILL).await?;
    daemon.restart().await?;
    assert_eq!(greets("127.0.0.1:12480").await?, "hello\n");
    let cri = daemon.cri().await?;
    cri.runtime.clone().remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() }).await?;
    assert!(TcpStream::connect_timeout(&"127.0.0.1:12480".parse()?, Duration::from_secs(2)).is_err());
    assert!(names(&daemon.state.join("netns")).is_empty());
    let taken = names(&directory.path().join("addresses/e2e"));
    assert!(!taken.iter().any(|name| name.starts_with("10.66.0.") || name.starts_with("fd66")), "{taken:?}");
    std::process::Command::new("ip").args(["link", "delete", "cnie2e0"]).status()?;
    Ok(())
}
