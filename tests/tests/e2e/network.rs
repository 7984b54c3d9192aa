//! The built-in pod network.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Cri, LogLine, TestPod, eventually, shell};

const NGINX: &str = "docker.io/library/nginx:latest";

/// What an HTTP server answers to GET /.
async fn get(address: &str) -> anyhow::Result<String> {
    eventually("answer over HTTP", Duration::from_secs(60), async || {
        let mut stream = TcpStream::connect((address, 80)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    })
    .await
}

#[tokio::test]
async fn nginx_answers_the_node_and_another_pod() -> anyhow::Result<()> {
    let server = TestPod::run("server").await?;
    server.cri.pull(NGINX).await?;
    let mut config = shell("nginx", "");
    config.image.get_or_insert_default().image = NGINX.to_owned();
    config.command.clear();
    let nginx = server.start(config).await?;
    let address = server.address().await?;
    let answer = get(&address).await?;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("served by nginx in a microVM.\n"), "{answer}");

    let client = TestPod::run("client").await?;
    let seen = client
        .script(&format!("wget -q -O - http://{address}/ && ping -c 2 -W 5 {address} >/dev/null && echo pinged"))
        .await?;
    assert_eq!(seen, "This page is served by nginx in a microVM.\npinged\n");
    let by_wget = |lines: &[LogLine]| lines.iter().any(|line| line.text().contains("Wget"));
    let lines = nginx.logged("access log", Duration::from_secs(20), by_wget).await?;
    let client_address = client.address().await?;
    assert!(
        lines.iter().any(|line| line.text().starts_with(&client_address)),
        "the pod's own address is seen: {lines:?}"
    );
    client.remove().await?;
    server.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_pod_has_its_address_a_default_route_and_reaches_the_node() -> anyhow::Result<()> {
    let pod = TestPod::run("route").await?;
    let address = pod.address().await?;
    let container = pod.start(shell("route", "sleep 1000")).await?;
    let seen = container.sh("ip -4 -o addr show dev eth0; ip route; ip link show lo").await?;
    assert!(seen.contains(&format!("inet {address}/")), "{seen}");
    assert!(seen.contains("default via "), "{seen}");
    assert!(seen.contains("LOOPBACK,UP"), "{seen}");
    assert!(container.sh("ping -c 1 -W 5 127.0.0.1").await?.contains("1 packets received"));

    let gateway = container.sh("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").await?;
    let listener = TcpListener::bind((gateway.trim(), 0))?;
    let port = listener.local_addr()?.port();
    let accepted = tokio::task::spawn_blocking(move || -> std::io::Result<String> {
        let (mut stream, peer) = listener.accept()?;
        stream.write_all(b"from the node\n")?;
        Ok(peer.ip().to_string())
    });
    let seen = container.sh(&format!("nc -w 10 {} {port} </dev/null", gateway.trim())).await?;
    assert_eq!(seen, "from the node\n");
    assert_eq!(accepted.await??, address);
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn containers_of_a_pod_share_its_network() -> anyhow::Result<()> {
    let pod = TestPod::run("localhost").await?;
    let _server = pod.start(shell("server", "while :; do echo hello | nc -l -p 7000; done")).await?;
    let seen = pod
        .script("for i in 1 2 3 4 5 6 7 8 9; do nc -w 5 127.0.0.1 7000 </dev/null && break; sleep 0.5; done")
        .await?;
    assert_eq!(seen, "hello\n");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn name_servers_and_hosts_are_those_asked_for() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    cri.pull(BUSYBOX).await?;
    let mut config = TestPod::config("dns");
    config.hostname = "named".to_owned();
    config.dns_config = Some(cri::DnsConfig {
        servers: vec!["10.96.0.10".to_owned(), "8.8.8.8".to_owned()],
        searches: vec!["ns.svc.cluster.local".to_owned()],
        options: vec!["ndots:5".to_owned()],
    });
    let pod = TestPod::run_with(&cri, config).await?;
    let address = pod.address().await?;
    assert_eq!(
        pod.script("cat /etc/resolv.conf").await?,
        "search ns.svc.cluster.local\nnameserver 10.96.0.10\nnameserver 8.8.8.8\noptions ndots:5\n"
    );
    let hosts = pod.script("cat /etc/hosts").await?;
    assert!(hosts.contains("127.0.0.1") && hosts.contains("localhost"), "{hosts}");
    assert!(hosts.lines().any(|line| line.starts_with(&address) && line.contains("named")), "{hosts}");
    let addresses = pod.status().await?.network.unwrap_or_default().additional_ips;
    let [second] = addresses.as_slice() else { anyhow::bail!("not two addresses: {addresses:?}") };
    assert!(hosts.lines().any(|line| line.starts_with(&second.ip) && line.contains("named")), "{hosts}");
    assert_eq!(pod.script("hostname; cat /etc/hostname").await?, "named\nnamed\n");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn megabytes_go_through_the_tap_in_both_directions() -> anyhow::Result<()> {
    let pod = TestPod::run("bulk").await?;
    let address = pod.address().await?;
    let _server = pod.start(shell("sink", "nc -l -p 7001 -e sh -c 'head -c 16777216 | sha256sum'")).await?;
    let data: Vec<u8> = (0..16u32 << 20).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let expected = {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), &data)?;
        let sum = std::process::Command::new("sha256sum").stdin(file.reopen()?).output()?;
        String::from_utf8(sum.stdout)?
    };
    let answer = tokio::task::spawn_blocking(move || -> anyhow::Result<String> {
        let mut stream = (0..100)
            .find_map(|_| {
                let made = TcpStream::connect((address.as_str(), 7001)).ok();
                if made.is_none() {
                    std::thread::sleep(Duration::from_millis(200));
                }
                made
            })
            .ok_or_else(|| anyhow::anyhow!("nothing listens in the pod"))?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        stream.write_all(&data)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
    .await??;
    assert_eq!(answer.split(' ').next(), expected.split(' ').next());
    pod.remove().await?;
    Ok(())
}
