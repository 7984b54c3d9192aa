//! In place of `isopod-vmm` in the configuration of a daemon: a VMM and an agent that do to the daemon what [`Behaviour`] says,
//! with no VM behind them. For a pod without a behaviour it becomes the real VMM.

mod agent;
mod sockets;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use isopod_proto::vmm::VmConfig;
use isopod_tests::hostile::Behaviour;
use isopod_vmm::sys::take_inherited_fd;
use prost::Message;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};

const REAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../out/isopod-vmm");

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    ensure!(arguments.next().as_deref() == Some("--config-fd"), "it is started as isopod-vmm is");
    let fd = arguments.next().context("--config-fd has no value")?.parse()?;
    let mut bytes = Vec::new();
    File::from(take_inherited_fd(fd)?).read_to_end(&mut bytes)?;
    ensure!(!bytes.is_empty(), "the daemon has gone");
    let config = VmConfig::decode(bytes.as_slice())?;
    let Some(behaviour) = Behaviour::of(config.memory_bytes) else { return become_real(&bytes) };
    let control = take_inherited_fd(config.control_fd)?;
    let vsock = take_inherited_fd(config.vsock_fd)?;
    eprintln!("hostile-agent: {behaviour:?}");
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(sockets::serve(
        behaviour,
        control.into(),
        vsock.into(),
    ))
}

/// Executes the real VMM with the same configuration.
fn become_real(config: &[u8]) -> Result<()> {
    let mut file = File::from(memfd_create("config", MemfdFlags::empty())?);
    file.write_all(config)?;
    file.rewind()?;
    fcntl_setfd(&file, FdFlags::empty())?;
    let number = file.as_raw_fd().to_string();
    Err(Command::new(REAL).args(["--config-fd", &number]).exec()).with_context(|| format!("cannot execute {REAL}"))
}
