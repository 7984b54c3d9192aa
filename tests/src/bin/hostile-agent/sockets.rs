//! The two sockets of a VMM, and what a guest says through them.

use std::os::unix::net::UnixListener as Listener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use futures_util::StreamExt;
use isopod_proto::agent::agent_server::AgentServer;
use isopod_proto::agent::{Hello, StreamOpen, StreamOpened};
use isopod_proto::vmm::control_reply::Reply;
use isopod_proto::vmm::control_request::Request;
use isopod_proto::vmm::{ConsoleContents, ControlReply, ControlRequest, Done, VmInfo};
use isopod_proto::{AGENT_PROTOCOL_VERSION, AGENT_RPC_PORT, MAX_CONTROL_MESSAGE, encode_frame};
use isopod_tests::hostile::Behaviour;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::agent::Fake;

/// What all connections of a VM share.
struct Vm {
    behaviour: Behaviour,
    /// Connections to the agent so far, and streams.
    connections: AtomicUsize,
    streams: AtomicUsize,
}

/// Serves both sockets until the daemon kills the process, or tells it to stop.
pub async fn serve(behaviour: Behaviour, control: Listener, vsock: Listener) -> Result<()> {
    control.set_nonblocking(true)?;
    vsock.set_nonblocking(true)?;
    let (control, vsock) = (UnixListener::from_std(control)?, UnixListener::from_std(vsock)?);
    let vm = Arc::new(Vm { behaviour, connections: AtomicUsize::new(0), streams: AtomicUsize::new(0) });
    loop {
        let vm = Arc::clone(&vm);
        tokio::select! {
            accepted = control.accept() => {
                let stream = accepted?.0;
                tokio::spawn(async move { answer_control(&vm, stream).await });
            }
            accepted = vsock.accept() => {
                let stream = accepted?.0;
                tokio::spawn(async move { connected(&vm, stream).await });
            }
        }
    }
}

/// A frame's message; its length is believed.
async fn read_frame<M: Message + Default>(stream: &mut UnixStream) -> Result<M> {
    let length = stream.read_u32_le().await? as usize;
    let mut bytes = vec![0; length.min(MAX_CONTROL_MESSAGE)];
    stream.read_exact(&mut bytes).await?;
    Ok(M::decode(bytes.as_slice())?)
}

/// The control socket. Descriptors that come along are lost, and closed.
async fn answer_control(vm: &Vm, mut stream: UnixStream) -> Result<()> {
    let request: ControlRequest = read_frame(&mut stream).await?;
    let reply = match (vm.behaviour, request.request) {
        // After what it takes to start a container.
        (Behaviour::Silent, Some(Request::Stop(_) | Request::RemoveDisk(_))) => return std::future::pending().await,
        (Behaviour::Flooding | Behaviour::Bloated, Some(Request::Stop(_))) => {
            let frame = [&u32::MAX.to_le_bytes()[..], &[0; 100_000]].concat();
            stream.write_all(&frame).await?;
            return std::future::pending().await;
        }
        // Says so, and lives on.
        (Behaviour::Lying, _) | (_, Some(Request::AddDisk(_))) => Reply::Done(Done {}),
        (Behaviour::Closing, Some(Request::Stop(_))) => return Ok(()),
        (_, Some(Request::Stop(_))) => std::process::exit(0),
        (_, Some(Request::Info(_))) => Reply::Info(VmInfo::default()),
        (_, Some(Request::Console(_))) => Reply::Console(ConsoleContents { bytes: b"\x1b[2J../..\0\xff".repeat(100) }),
        _ => Reply::Done(Done {}),
    };
    stream.write_all(&encode_frame(&ControlReply { reply: Some(reply) })).await?;
    Ok(())
}

/// A connection of the daemon to the guest, or one that waits for the guest's hello.
async fn connected(vm: &Vm, mut stream: UnixStream) -> Result<()> {
    let mut line = String::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte.into()),
        }
    }
    match line.split_once(' ') {
        Some(("ACCEPT", _)) => hello(vm.behaviour, stream).await,
        Some(("CONNECT", port)) if port == AGENT_RPC_PORT.to_string() => calls(vm, stream).await,
        Some(("CONNECT", _)) => stream_of_bytes(vm, stream).await,
        _ => bail!("an unknown line {line:?}"),
    }
}

async fn hello(behaviour: Behaviour, mut stream: UnixStream) -> Result<()> {
    let hello = Hello {
        protocol_version: AGENT_PROTOCOL_VERSION,
        agent_version: "\n\x1b[31m../../etc/passwd".repeat(50),
        kernel_release: "\0".repeat(100),
        uptime_nanos: u64::MAX,
        ..Hello::default()
    };
    let frame = encode_frame(&hello);
    match behaviour {
        Behaviour::NoHello => {}
        Behaviour::EndlessLine => stream.write_all(&vec![b'O'; 1 << 20]).await?,
        Behaviour::RubbishHello => {
            stream.write_all(b"OK 1\n").await?;
            stream.write_all(&[&100u32.to_le_bytes()[..], &[0xff; 100]].concat()).await?;
        }
        Behaviour::HugeHello => {
            stream.write_all(b"OK 1\n").await?;
            stream.write_all(&u32::MAX.to_le_bytes()).await?;
            // Until the daemon has had enough.
            while stream.write_all(&[0; 65536]).await.is_ok() {}
        }
        Behaviour::CutHello => {
            stream.write_all(b"OK 1\n").await?;
            return Ok(stream.write_all(&frame[..frame.len() / 2]).await?);
        }
        Behaviour::SlowHello => {
            stream.write_all(b"OK 1\n").await?;
            for byte in frame {
                stream.write_all(&[byte]).await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        _ => {
            stream.write_all(b"OK 1\n").await?;
            stream.write_all(&frame).await?;
        }
    }
    std::future::pending().await
}

/// gRPC.
async fn calls(vm: &Vm, mut stream: UnixStream) -> Result<()> {
    let number = vm.connections.fetch_add(1, Ordering::Relaxed);
    stream.write_all(b"OK 1\n").await?;
    // The first one is what makes the pod.
    if vm.behaviour == Behaviour::Closing && !number.is_multiple_of(2) {
        return Ok(());
    }
    let service = AgentServer::new(Fake::new(vm.behaviour)).max_encoding_message_size(usize::MAX);
    let connections = futures_util::stream::iter([Ok::<_, std::io::Error>(stream)]);
    let server = tonic::transport::Server::builder().add_service(service);
    Ok(server.serve_with_incoming(connections.chain(futures_util::stream::pending())).await?)
}

/// Output of a process, by what is said of it.
async fn stream_of_bytes(vm: &Vm, mut stream: UnixStream) -> Result<()> {
    let number = vm.streams.fetch_add(1, Ordering::Relaxed);
    let opened = encode_frame(&StreamOpened::default());
    let good = [b"OK 1\n".as_slice(), &opened, b"a line\n"].concat();
    match vm.behaviour {
        Behaviour::Closing => {
            stream.write_all(&good[..number % (good.len() + 1)]).await?;
            Ok(())
        }
        Behaviour::Lying => {
            stream.write_all(b"OK 1\n").await?;
            let _: StreamOpen = read_frame(&mut stream).await?;
            stream.write_all(&good[5..]).await?;
            // Acknowledgements are not what is sent here.
            stream.write_all(&u64::MAX.to_le_bytes()).await?;
            std::future::pending().await
        }
        Behaviour::Flooding => {
            stream.write_all(b"OK 1\n").await?;
            let _: StreamOpen = read_frame(&mut stream).await?;
            stream.write_all(&opened).await?;
            // One line without an end, and one stream with nothing but ends; acknowledgements are never read.
            let bytes = if number.is_multiple_of(2) { [b'x'; 65536] } else { [b'\n'; 65536] };
            loop {
                stream.write_all(&bytes).await?;
                // The log is on the node's disk, which is small.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        _ => {
            stream.write_all(b"OK 1\n").await?;
            std::future::pending().await
        }
    }
}
