//! Drives the agent of a running VM through one pod, for looking into a guest by hand: `pod VSOCK SCRATCH IMAGE BLOCKS ROOT COMMAND...`
//! configures the pod with the scratch disk, attaches the image disk, runs the command in a container, prints its output
//! and end, and powers the guest off. VSOCK is the VMM's socket; SCRATCH ("" for none) and IMAGE are serials of disks;
//! BLOCKS and ROOT are the image's blocks of data and root hash.

use std::path::{Path, PathBuf};
use std::time::Instant;

use hyper_util::rt::TokioIo;
use isopod_proto::agent::agent_client::AgentClient;
use isopod_proto::agent::{
    AttachDiskRequest, ConfigurePodRequest, CreateContainerRequest, PidMode, Process, RemoveContainerRequest,
    ShutdownRequest, StartContainerRequest, StatsRequest, StreamKind, StreamOpen, StreamOpened, Verity,
    WaitProcessRequest,
};
use isopod_proto::{AGENT_RPC_PORT, AGENT_STREAM_PORT, MAX_STREAM_HEADER, decode_frame, encode_frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tonic::transport::Endpoint;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [vsock, scratch, image, blocks, root, command @ ..] = &arguments[..] else {
        return Err("see the source".into());
    };
    let socket = PathBuf::from(vsock);
    let path = socket.clone();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { connect(&path, AGENT_RPC_PORT).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://agent").connect_with_connector(connector).await?;
    let mut client = AgentClient::new(channel);
    let start = Instant::now();
    let say = |what: &str| println!("{:8.3} s  {what}", start.elapsed().as_secs_f64());

    let nanos = std::time::UNIX_EPOCH.elapsed()?.as_nanos();
    let pod = ConfigurePodRequest {
        hostname: "pod".into(),
        scratch_disk: scratch.clone(),
        realtime_nanos: i64::try_from(nanos)?,
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
        ..ConfigurePodRequest::default()
    };
    client.configure_pod(pod).await?;
    say("configured");
    let digit = |index: usize| root.get(index..index + 2).ok_or("ROOT is not hexadecimal digits");
    let bytes = (0..root.len()).step_by(2).map(|index| Ok(u8::from_str_radix(digit(index)?, 16)?));
    let verity = Verity { root_hash: bytes.collect::<Outcome<_>>()?, data_blocks: blocks.parse()? };
    client.attach_disk(AttachDiskRequest { id: image.clone(), image: Some(verity) }).await?;
    say("image attached");
    let id = "a".repeat(64);
    let process = Process { args: command.to_vec(), env: vec![b"PATH=/bin:/usr/bin".to_vec()], ..Process::default() };
    let container = CreateContainerRequest {
        id: id.clone(),
        image_disk: image.clone(),
        process: Some(process),
        pid_mode: PidMode::Pod as i32,
        ..CreateContainerRequest::default()
    };
    let user = client.create_container(container).await?.into_inner().user;
    say(&format!("created, {user:?}"));
    client.start_container(StartContainerRequest { id: id.clone() }).await?;
    say("started");
    for kind in [StreamKind::Stdout, StreamKind::Stderr] {
        print!("{}", String::from_utf8_lossy(&output(&socket, &id, kind).await?));
    }
    let end = client.wait_process(WaitProcessRequest { process_id: id.clone() }).await?.into_inner();
    say(&format!("ended, {end:?}"));
    println!("{:#?}", client.stats(StatsRequest::default()).await?.into_inner());
    client.remove_container(RemoveContainerRequest { id }).await?;
    say("removed");
    client.shutdown(ShutdownRequest {}).await?;
    Ok(())
}

/// A connection to a port of the guest, by the VMM's socket.
async fn connect(socket: &Path, port: u32) -> std::io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") {
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK") { Ok(stream) } else { Err(std::io::ErrorKind::ConnectionRefused.into()) }
}

async fn output(socket: &Path, process: &str, kind: StreamKind) -> Outcome<Vec<u8>> {
    let mut stream = connect(socket, AGENT_STREAM_PORT).await?;
    let open = StreamOpen { process_id: process.into(), kind: kind as i32, offset: 0, port: 0 };
    stream.write_all(&encode_frame(&open)).await?;
    let mut bytes = Vec::new();
    while decode_frame::<StreamOpened>(&bytes, MAX_STREAM_HEADER)?.is_none() {
        bytes.push(stream.read_u8().await?);
    }
    let mut taken = Vec::new();
    while stream.read_buf(&mut taken).await? > 0 {
        // The agent may have closed already if everything was acknowledged before.
        let _ = stream.write_all(&(taken.len() as u64).to_le_bytes()).await;
    }
    Ok(taken)
}
