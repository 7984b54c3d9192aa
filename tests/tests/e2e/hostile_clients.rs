//! Clients that break the protocol after the upgrade: their connection ends, their command with it, and nothing else.

use std::time::Duration;

use anyhow::{Context, ensure};
use futures_util::{SinkExt, StreamExt};
use isopod_cri_server::cri;
use isopod_tests::fixture::{TestPod, eventually, shell};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::ClientRequestBuilder;

use crate::websocket::{Session, connect, exec_url};

const PATIENCE: Duration = Duration::from_secs(60);
const STDIN: u8 = 0;

/// Bytes that no SPDY client sends.
const BAD_SPDY: [(&str, &[u8]); 7] = [
    ("nothing but ones", &[0xff; 64]),
    ("another version", b"\x80\x02\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01"),
    ("an unknown frame", b"\x80\x03\x00\x63\x00\x00\x00\x00"),
    ("a ping of three bytes", b"\x80\x03\x00\x06\x00\x00\x00\x03xxx"),
    ("a frame of 16 MiB of headers", b"\x80\x03\x00\x01\x00\xff\xff\xff"),
    (
        "headers that are not compressed",
        b"\x80\x03\x00\x01\x00\x00\x00\x10\x00\x00\x00\x65\x00\x00\x00\x00\x00\x00rubbis",
    ),
    ("a stream of the server's", b"\x80\x03\x00\x01\x00\x00\x00\x0a\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00"),
];

/// Bytes that no WebSocket client of version 4 or 5 sends. The masks are zero.
const BAD_WEBSOCKET: [(&str, &[u8]); 9] = [
    ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a frame without a mask", b"\x82\x05\x00abcd"),
    ("a frame of a reserved kind", b"\x83\x80\x00\x00\x00\x00"),
    ("reserved bits", b"\xf2\x81\x00\x00\x00\x00\x00"),
    ("a frame of 8 EiB", b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00"),
    ("a message of 2 MiB", b"\x82\xff\x00\x00\x00\x00\x00\x20\x00\x00\x00\x00\x00\x00"),
    ("the rest of no message", b"\x80\x81\x00\x00\x00\x00\x00"),
    ("text in a protocol of bytes", b"\x81\x82\x00\x00\x00\x000a"),
    ("a message without a channel", b"\x82\x80\x00\x00\x00\x00"),
];

/// The connection to a URL after its upgrade to SPDY.
async fn spdy(url: &str, protocol: &str) -> anyhow::Result<TcpStream> {
    let (mut stream, rest) = connect(url).await?;
    let (host, path) = rest.split_once('/').context("a path")?;
    let head = format!(
        "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: {protocol}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let answer = read_until(&mut stream, b"\r\n\r\n").await?;
    ensure!(answer.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&answer));
    Ok(stream)
}

async fn read_until(stream: &mut TcpStream, wanted: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while !bytes.windows(wanted.len()).any(|window| window == wanted) {
        let count = timeout(PATIENCE, stream.read_buf(&mut bytes)).await??;
        ensure!(count > 0, "the connection ended after {:?}", String::from_utf8_lossy(&bytes));
    }
    Ok(bytes)
}

/// Waits until the server has closed the connection, in whatever way.
async fn closed(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut buffer = vec![0; 4096];
    let end = async { while let Ok(1..) = stream.read(&mut buffer).await {} };
    timeout(PATIENCE, end).await.context("the connection does not end")
}

/// A SYN_STREAM whose one header says what the stream is for. The headers of a connection are one zlib stream, which
/// begins with the dictionary's checksum; here it goes on with stored blocks (RFC 1951, section 3.2.4).
fn open(id: u32, kind: &str) -> Vec<u8> {
    let mut headers = 1u32.to_be_bytes().to_vec();
    for text in ["streamtype", kind] {
        headers.extend((text.len() as u32).to_be_bytes());
        headers.extend(text.as_bytes());
    }
    let beginning: &[u8] = if id == 1 { b"\x78\xf9\xe3\xc6\xa7\xc2" } else { b"" };
    let length = headers.len() as u16;
    let block = [beginning, &[0], &length.to_le_bytes(), &(!length).to_le_bytes(), &headers].concat();
    let contents = [&id.to_be_bytes(), &[0; 6][..], &block].concat();
    [b"\x80\x03\x00\x01", &(contents.len() as u32).to_be_bytes()[..], &contents].concat()
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_ends_its_own_session_alone() -> anyhow::Result<()> {
    let pod = TestPod::run("hostile").await?;
    let container = pod.start(shell("hostile", "sleep 1000")).await?;
    let mut other = Session::start(&exec_url(&container, &["cat"], true, false).await?).await?;
    let mut number = 4000;
    let mut command = async || {
        number += 1;
        let script = format!("echo up; exec sleep {number}");
        exec_url(&container, &["sh", "-c", &script], true, false).await
    };

    for (what, bytes) in BAD_SPDY {
        let case = async {
            let mut stream = spdy(&command().await?, "v4.channel.k8s.io").await?;
            for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
                stream.write_all(&open(id, kind)).await?;
            }
            read_until(&mut stream, b"up\n").await?;
            stream.write_all(bytes).await?;
            closed(&mut stream).await?;
            // Before the streams are there.
            let mut stream = spdy(&command().await?, "v4.channel.k8s.io").await?;
            stream.write_all(bytes).await?;
            closed(&mut stream).await
        };
        case.await.with_context(|| format!("SPDY: {what}"))?;
        other.send(STDIN, what.as_bytes()).await?;
        other.until(what).await?;
    }
    for (what, bytes) in BAD_WEBSOCKET {
        let case = async {
            let mut session = Session::start(&command().await?).await?;
            session.until("up\n").await?;
            let stream = session.socket.get_mut();
            stream.write_all(bytes).await?;
            closed(stream).await
        };
        case.await.with_context(|| format!("WebSocket: {what}"))?;
        other.send(STDIN, what.as_bytes()).await?;
        other.until(what).await?;
    }
    // A frame that is cut off by the end of the connection.
    let mut session = Session::start(&command().await?).await?;
    session.until("up\n").await?;
    session.socket.get_mut().write_all(b"\x82\xfe\x10").await?;
    session.socket.get_mut().shutdown().await?;
    closed(session.socket.get_mut()).await?;

    let started = number - 4000;
    assert_eq!(started, 2 * BAD_SPDY.len() + BAD_WEBSOCKET.len() + 1);
    eventually("end of the commands", PATIENCE, async || {
        let ps = container.sh("ps").await.ok()?;
        (!ps.contains("sleep 4")).then_some(())
    })
    .await?;
    assert!(container.sh("ps").await?.contains("sleep 1000"), "the container's own process is there");
    other.send(STDIN, b"still there\n").await?;
    other.until("still there\n").await?;
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_port_forward_that_breaks_the_protocol_ends_alone() -> anyhow::Result<()> {
    let pod = TestPod::run("hostile-forward").await?;
    let url = async || {
        let request = cri::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: Vec::new() };
        anyhow::Ok(pod.cri.runtime.clone().port_forward(request).await?.into_inner().url)
    };
    for (what, bytes) in BAD_SPDY {
        let case = async {
            let mut stream = spdy(&url().await?, "portforward.k8s.io").await?;
            stream.write_all(bytes).await?;
            closed(&mut stream).await?;

            // The same in the messages of a WebSocket.
            let url = url().await?;
            let (stream, rest) = connect(&url).await?;
            let request = ClientRequestBuilder::new(format!("ws://{rest}").parse()?)
                .with_sub_protocol("SPDY/3.1+portforward.k8s.io");
            let (mut socket, _) = timeout(PATIENCE, tokio_tungstenite::client_async(request, stream)).await??;
            let message = tokio_tungstenite::tungstenite::Message::binary(bytes.to_vec());
            socket.send(message).await?;
            // A client that confirms the end is not waited for longer.
            let end = async { while let Some(Ok(_)) = socket.next().await {} };
            timeout(PATIENCE, end).await.context("the connection does not end")
        };
        case.await.with_context(|| what.to_owned())?;
    }
    assert_eq!(pod.script("echo alive").await?, "alive\n");
    pod.remove().await?;
    Ok(())
}
