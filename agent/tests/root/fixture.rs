//! An agent in namespaces of its own, a client of it, and an image.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use isopod_proto::agent::agent_client::AgentClient;
use isopod_proto::agent::{
    AttachDiskRequest, Capabilities, ConfigurePodRequest, CreateContainerRequest, ExecRequest, MakeVolumeRequest,
    Mount, PidMode, PodVolume, Process, StartContainerRequest, StreamKind, StreamOpen, StreamOpened, User, Verity,
    WaitProcessRequest, WaitProcessResponse, make_volume_request, mount,
};
use isopod_proto::{MAX_STREAM_HEADER, ObjectId, decode_frame, encode_frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// How long anything here may take.
pub const TIMEOUT: Duration = Duration::from_secs(30);
/// Where a cgroup v2 hierarchy is: alone, or beside version 1.
const CGROUP_ROOTS: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
const DISK: &str = "image";

/// An agent that runs, and a pod in it.
pub struct Fixture {
    pub client: AgentClient<Channel>,
    agent: Child,
    directory: tempfile::TempDir,
    cgroup: PathBuf,
}

/// The fixture, or a printed skip.
pub async fn fixture() -> Option<Fixture> {
    if !rustix::process::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "this test needs root, and CI may not skip it");
        println!("skipped: this test needs root");
        return None;
    }
    Some(tokio::time::timeout(TIMEOUT, Fixture::start()).await.expect("the agent serves in time"))
}

impl Fixture {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_image(&directory.path().join("run/disks").join(DISK));
        let root = CGROUP_ROOTS.iter().map(Path::new).find(|root| root.join("cgroup.controllers").exists());
        let name = directory.path().file_name().unwrap().to_str().unwrap().trim_start_matches('.');
        let cgroup = root.expect("a cgroup v2 hierarchy is mounted").join(format!("isopod-test-{name}"));
        fs::create_dir(&cgroup).unwrap();
        let agent = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--net", "--uts", "--ipc", "--mount-proc", "--kill-child"])
            // As the agent does at the boot of a guest.
            .args(["sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
            .arg(env!("CARGO_BIN_EXE_isopod-agent"))
            .arg("--listen-unix")
            .arg(directory.path())
            .arg("--cgroup")
            .arg(&cgroup)
            .spawn()
            .unwrap();
        let socket = directory.path().join("rpc");
        let client = loop {
            let socket = socket.clone();
            let connector = tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            });
            match Endpoint::from_static("http://agent").connect_with_connector(connector).await {
                Ok(channel) => break AgentClient::new(channel),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        let mut fixture = Self { client, agent, directory, cgroup };
        let request = ConfigurePodRequest {
            hostname: "pod-1".into(),
            hosts: b"127.0.0.1 localhost\n".to_vec(),
            resolv_conf: b"nameserver 10.0.0.1\n".to_vec(),
            ..ConfigurePodRequest::default()
        };
        fixture.client.configure_pod(request).await.unwrap();
        fixture
            .client
            .attach_disk(AttachDiskRequest { id: DISK.into(), image: Some(Verity::default()) })
            .await
            .unwrap();
        fixture
    }

    /// Makes a volume of the pod in memory, and the mount of what is at `sub_path` in it.
    pub async fn volume(&mut self, name: &str, sub_path: &str, destination: &str, mode: u32) -> Mount {
        let request = MakeVolumeRequest {
            name: name.into(),
            storage: Some(make_volume_request::Storage::TmpfsSizeBytes(1 << 20)),
            mode,
            gid: 2000,
            ..MakeVolumeRequest::default()
        };
        self.client.make_volume(request).await.unwrap();
        let volume = PodVolume { name: name.into(), sub_path: sub_path.into() };
        let source = Some(mount::Source::Volume(volume));
        Mount { destination: destination.into(), source, ..Mount::default() }
    }

    /// A directory of the agent's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Creates and starts a container that runs `script` with busybox's shell.
    pub async fn run(&mut self, script: &str) -> String {
        let request = request(script);
        let id = request.id.clone();
        self.client.create_container(request).await.unwrap();
        self.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();
        id
    }

    /// All of a process's output stream, acknowledged.
    pub async fn output(&self, process: &str, kind: StreamKind) -> Vec<u8> {
        let mut stream = self.open(process, kind, 0).await.unwrap();
        let mut taken = Vec::new();
        loop {
            let count = within(stream.read_buf(&mut taken)).await.unwrap();
            if count == 0 {
                return taken;
            }
            // The agent may have closed already if everything was acknowledged before.
            let _ = stream.write_all(&(taken.len() as u64).to_le_bytes()).await;
        }
    }

    /// A stream connection, or the agent's error.
    pub async fn open(&self, process: &str, kind: StreamKind, offset: u64) -> Result<UnixStream, String> {
        self.open_with(process, kind, offset, 0).await
    }

    /// The same with a port.
    pub async fn open_with(
        &self,
        process: &str,
        kind: StreamKind,
        offset: u64,
        port: u32,
    ) -> Result<UnixStream, String> {
        let mut stream = UnixStream::connect(self.path("stream")).await.unwrap();
        let open = StreamOpen { process_id: process.into(), kind: kind as i32, offset, port };
        stream.write_all(&encode_frame(&open)).await.unwrap();
        let mut header = [0; 4];
        within(stream.read_exact(&mut header)).await.unwrap();
        let mut frame = vec![0; 4 + u32::from_le_bytes(header) as usize];
        frame[..4].copy_from_slice(&header);
        within(stream.read_exact(&mut frame[4..])).await.unwrap();
        let (opened, _) = decode_frame::<StreamOpened>(&frame, MAX_STREAM_HEADER).unwrap().unwrap();
        if opened.error.is_empty() { Ok(stream) } else { Err(opened.error) }
    }

    /// Runs `script` to its end; the exit and what it wrote to standard output.
    pub async fn complete(&mut self, script: &str) -> (WaitProcessResponse, String) {
        let id = self.run(script).await;
        let output = self.output(&id, StreamKind::Stdout).await;
        self.output(&id, StreamKind::Stderr).await;
        (self.wait(&id).await, String::from_utf8(output).unwrap())
    }

    /// A request's container run to its end: its standard output.
    pub async fn output_of(&mut self, request: CreateContainerRequest) -> String {
        let id = request.id.clone();
        self.client.create_container(request).await.unwrap();
        self.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();
        let error = self.output(&id, StreamKind::Stderr).await;
        let output = self.output(&id, StreamKind::Stdout).await;
        assert!(error.is_empty(), "{}", String::from_utf8_lossy(&error));
        String::from_utf8(output).unwrap()
    }

    /// Waits for the end of a process.
    pub async fn wait(&mut self, id: &str) -> WaitProcessResponse {
        within(self.client.wait_process(WaitProcessRequest { process_id: id.into() })).await.unwrap().into_inner()
    }

    /// Runs `script` in a running container: its exit and output.
    pub async fn exec(&mut self, container: &str, script: &str) -> (i32, String) {
        let process_id = new_id();
        let request = ExecRequest {
            container_id: container.into(),
            process_id: process_id.clone(),
            process: Some(process(script)),
        };
        self.client.exec(request).await.unwrap();
        let output = self.output(&process_id, StreamKind::Stdout).await;
        let error = self.output(&process_id, StreamKind::Stderr).await;
        let output = String::from_utf8([output, error].concat()).unwrap();
        (self.wait(&process_id).await.exit_code, output)
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let deadline = Instant::now() + Duration::from_secs(5);
        for entry in fs::read_dir(&self.cgroup).into_iter().flatten().flatten() {
            while entry.path().is_dir() && fs::remove_dir(entry.path()).is_err() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let _ = fs::remove_dir(&self.cgroup);
    }
}

/// Fails if it takes too long.
pub async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(TIMEOUT, future).await.expect("it ends in time")
}

/// An id nobody has.
pub fn new_id() -> String {
    static NEXT: AtomicU8 = AtomicU8::new(0);
    ObjectId::from_random([NEXT.fetch_add(1, Ordering::Relaxed); 32]).as_str().to_owned()
}

/// A process that runs `script`.
pub fn process(script: &str) -> Process {
    let all =
        ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SYS_CHROOT"];
    let names: Vec<String> = all.iter().map(|name| format!("CAP_{name}")).collect();
    let capabilities =
        Capabilities { bounding: names.clone(), effective: names.clone(), permitted: names, ..Capabilities::default() };
    Process {
        args: vec!["sh".into(), "-c".into(), script.into()],
        env: vec![b"PATH=/bin".to_vec()],
        user: Some(User::default()),
        capabilities: Some(capabilities),
        ..Process::default()
    }
}

/// A container that runs `script`.
pub fn request(script: &str) -> CreateContainerRequest {
    CreateContainerRequest {
        id: new_id(),
        image_disk: DISK.into(),
        process: Some(process(script)),
        pid_mode: PidMode::Container as i32,
        ..CreateContainerRequest::default()
    }
}

/// Busybox and its links, and some files.
fn make_image(image: &Path) {
    for path in ["bin", "etc", "tmp", "srv"] {
        fs::create_dir_all(image.join(path)).unwrap();
    }
    fs::copy("/bin/busybox", image.join("bin/busybox")).expect("the package busybox-static is installed");
    let list = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", image.join("bin").join(applet)).unwrap();
    }
    fs::write(image.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n").unwrap();
    fs::write(image.join("etc/group"), "root:x:0:\nweb:x:34:\ndisk:x:6:web\n").unwrap();
    fs::write(image.join("etc/not-executable"), "#!/bin/sh\n").unwrap();
    // A volume whose place is a link out of the image must stay inside.
    symlink("/../../../../escaped", image.join("srv/out")).unwrap();
}
