//! Starts `isopod-vmm` by itself, without the daemon: for benchmarks and for tests of the VMM.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use command_fds::{CommandFdExt, FdMapping};
use isopod_proto::agent::Hello;
use isopod_proto::vmm::{User, VmConfig, VmExit};
use isopod_proto::{HELLO_PORT, MAX_HELLO, decode_frame};
use prost::Message;
use tempfile::TempDir;

/// What a microVM is started with.
pub struct MicroVmConfig<'a> {
    /// The `isopod-vmm` binary.
    pub vmm: &'a Path,
    /// Uncompressed vmlinux.
    pub kernel: &'a Path,
    /// The initramfs with the agent.
    pub initramfs: &'a Path,
    /// 1 to 64.
    pub vcpus: u32,
    /// What it can be resized to.
    pub max_vcpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// What it can be resized to.
    pub max_memory_bytes: u64,
}

/// A running VMM process and its sockets; killed on drop.
pub struct MicroVm {
    child: Child,
    directory: TempDir,
    hello: UnixStream,
}

/// Descriptor numbers in the child, in the order in which they are passed.
const CONFIG_FD: i32 = 3;
const KERNEL_FD: i32 = 4;
const INITRAMFS_FD: i32 = 5;
const CONTROL_FD: i32 = 6;
const VSOCK_FD: i32 = 7;
const EXIT_FD: i32 = 8;

impl MicroVm {
    /// Starts the VMM. The guest boots at once; [`MicroVm::hello`] waits for its agent.
    pub fn start(config: &MicroVmConfig) -> Result<Self> {
        let directory = TempDir::new()?;
        let control = UnixListener::bind(directory.path().join("control.sock"))?;
        let vsock_path = directory.path().join("vsock.sock");
        let vsock = UnixListener::bind(&vsock_path)?;
        let mut hello = UnixStream::connect(&vsock_path)?;
        writeln!(hello, "ACCEPT {HELLO_PORT}")?;
        let exit = File::create(directory.path().join("exit"))?;
        let (config_reader, mut config_writer) = std::io::pipe()?;
        let open = |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));

        let inherited: [(i32, OwnedFd); 6] = [
            (CONFIG_FD, config_reader.into()),
            (KERNEL_FD, open(config.kernel)?.into()),
            (INITRAMFS_FD, open(config.initramfs)?.into()),
            (CONTROL_FD, control.into()),
            (VSOCK_FD, vsock.into()),
            (EXIT_FD, exit.into()),
        ];
        let mappings =
            inherited.into_iter().map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect::<Vec<_>>();
        let child = Command::new(config.vmm)
            .args(["--config-fd", &CONFIG_FD.to_string()])
            .fd_mappings(mappings)?
            .spawn()
            .with_context(|| format!("cannot start {}", config.vmm.display()))?;
        config_writer.write_all(
            &VmConfig {
                vcpus: config.vcpus,
                memory_bytes: config.memory_bytes,
                max_vcpus: config.max_vcpus,
                max_memory_bytes: config.max_memory_bytes,
                kernel_fd: KERNEL_FD,
                initramfs_fd: INITRAMFS_FD,
                control_fd: CONTROL_FD,
                vsock_fd: VSOCK_FD,
                guest_cid: 3,
                user: Some(User { uid: 0x7000_0000, gid: 0x7000_0000 }),
                exit_fd: EXIT_FD,
                ..VmConfig::default()
            }
            .encode_to_vec(),
        )?;
        drop(config_writer);
        Ok(Self { child, directory, hello })
    }

    /// Waits for the agent's hello. An error tells what the VMM's exit record says, if it has exited.
    pub fn hello(&mut self, deadline: Duration) -> Result<Hello> {
        self.hello.set_read_timeout(Some(deadline))?;
        match read_hello(&mut self.hello) {
            Ok(hello) => Ok(hello),
            Err(error) => Err(error.context(self.exit_record())),
        }
    }

    /// Process id of the VMM.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the VMM listens for control connections.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    fn exit_record(&mut self) -> String {
        let status = self.child.try_wait();
        let bytes = std::fs::read(self.directory.path().join("exit")).unwrap_or_default();
        match decode_frame::<VmExit>(&bytes, 1 << 20) {
            Ok(Some((exit, _))) => {
                let console = String::from_utf8_lossy(&exit.console).into_owned();
                format!("the VMM ended: {:?}: {}\n{console}", exit.reason(), exit.message)
            }
            _ => format!("the VMM left no exit record; its status is {status:?}"),
        }
    }
}

impl Drop for MicroVm {
    fn drop(&mut self) {
        // It may have exited by itself; either way there must be no zombie left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads the VMM's answer to ACCEPT and the agent's hello from the vsock connection.
fn read_hello(stream: &mut UnixStream) -> Result<Hello> {
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).context("no hello from the agent")?;
        answer.push(byte[0]);
        if answer.len() > 32 {
            bail!("the VMM's answer to ACCEPT is {answer:?}");
        }
    }
    receive_hello(stream)
}

/// Reads a length-prefixed [`Hello`].
fn receive_hello(stream: &mut impl Read) -> Result<Hello> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 512];
    loop {
        if let Some((hello, _)) = decode_frame(&bytes, MAX_HELLO)? {
            return Ok(hello);
        }
        let count = stream.read(&mut chunk).context("no hello from the agent")?;
        if count == 0 {
            bail!("the connection ended within the agent's hello");
        }
        bytes.extend_from_slice(&chunk[..count]);
    }
}
