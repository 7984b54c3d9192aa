//! From VMM start to the agent's hello: isopod-vmm beside QEMU's `microvm` machine with the same kernel and initramfs.
//!
//! Runs in the test node. Prints one row a VMM: median time, VM exits (all, and to user space), private memory of the VMM
//! process without the guest's, and memory used in the guest at hello. Exit counts do not depend on the machine's speed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use isopod_proto::agent::Hello;
use isopod_proto::{HELLO_PORT, MAX_HELLO, decode_frame};
use isopod_tests::kvm_trace::{ExitCounter, Exits};
use isopod_tests::microvm::{MicroVm, MicroVmConfig};
use isopod_tests::process_memory::private_bytes_outside_guest;
use tokio::io::AsyncReadExt;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

const MEMORY_BYTES: u64 = 128 << 20;
/// What the daemon lets a VM of isopod's grow to on a host with so much, by default. QEMU's has no room to grow.
const MAX_VCPUS: u32 = 8;
const MAX_MEMORY_BYTES: u64 = 64 << 30;
const RUNS: usize = 5;
/// Where QEMU puts the initramfs: above the kernel, below the end of memory.
const INITRD_ADDRESS: u64 = 64 << 20;
/// As isopod-vmm's own.
const CMDLINE: &str = "console=ttyS0 quiet reboot=t panic=-1 no_timer_check loop.max_loop=0 dummy.numdummies=0";
const DEADLINE: Duration = Duration::from_secs(120);

struct Sample {
    time: Duration,
    exits: Exits,
    private_bytes: u64,
    hello: Hello,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let mut next = |what: &str| arguments.next().with_context(|| format!("missing argument: {what}"));
    let (vmm, kernel, initramfs) = (next("isopod-vmm")?, next("vmlinux")?, next("initramfs")?);
    let isopod = (0..RUNS).map(|_| boot_isopod(&vmm, &kernel, &initramfs)).collect::<Result<Vec<_>>>()?;
    let qemu = (0..RUNS).map(|_| boot_qemu(&kernel, &initramfs)).collect::<Result<Vec<_>>>()?;

    println!("boot to the agent's hello, 1 vCPU, {} MiB, median of {RUNS} runs", MEMORY_BYTES >> 20);
    println!(
        "{:<14} {:>9} {:>10} {:>12} {:>16} {:>18}",
        "VMM", "time", "VM exits", "to VMM", "VMM private KiB", "guest used MiB"
    );
    print_row("isopod-vmm", &isopod);
    print_row("QEMU microvm", &qemu);
    let ratio = |value: fn(&Sample) -> f64| median(&isopod, value) / median(&qemu, value);
    println!(
        "ratio isopod/QEMU: time {:.2}, exits {:.2}, exits to user space {:.3}",
        ratio(|s| s.time.as_secs_f64()),
        ratio(|s| s.exits.total as f64),
        ratio(|s| s.exits.userspace as f64)
    );
    Ok(())
}

fn boot_isopod(vmm: &Path, kernel: &Path, initramfs: &Path) -> Result<Sample> {
    let counter = ExitCounter::start()?;
    let start = Instant::now();
    let mut vm = MicroVm::start(&MicroVmConfig {
        vmm,
        kernel,
        initramfs,
        vcpus: 1,
        max_vcpus: MAX_VCPUS,
        memory_bytes: MEMORY_BYTES,
        max_memory_bytes: MAX_MEMORY_BYTES,
    })?;
    let hello = vm.hello(DEADLINE)?;
    let time = start.elapsed();
    let exits = counter.read()?;
    Ok(Sample { time, exits, private_bytes: private_bytes_outside_guest(vm.pid(), MEMORY_BYTES)?, hello })
}

fn boot_qemu(kernel: &Path, initramfs: &Path) -> Result<Sample> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // The listener belongs to the runtime's reactor.
    let listener = runtime.block_on(async { VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, HELLO_PORT)) })?;
    let counter = ExitCounter::start()?;
    let start = Instant::now();
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,acpi=on,pcie=on,pit=off,pic=off,rtc=off", "-accel", "kvm", "-cpu", "host", "-smp", "1"])
        .args(["-m", &format!("{}M", MEMORY_BYTES >> 20), "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-serial", "null", "-no-reboot"])
        .args(["-device", "vhost-vsock-pci,guest-cid=3", "-device", "virtio-rng-pci"])
        // Not -initrd: QEMU 10.0 loads it over microvm's ACPI tables.
        .args(["-device", &format!("loader,file={},addr={INITRD_ADDRESS:#x},force-raw=on", initramfs.display())])
        .args(["-append", &format!("{CMDLINE} initrdmem={INITRD_ADDRESS:#x},{}", initramfs.metadata()?.len())])
        .arg("-kernel")
        .arg(kernel)
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start qemu-system-x86_64")?;
    let sample = runtime.block_on(async {
        let (mut stream, _) = tokio::time::timeout(DEADLINE, listener.accept()).await.context("no hello in QEMU")??;
        let hello = tokio::time::timeout(DEADLINE, receive_hello_async(&mut stream)).await??;
        let time = start.elapsed();
        let exits = counter.read()?;
        let private_bytes = private_bytes_outside_guest(child.id(), MEMORY_BYTES)?;
        Ok(Sample { time, exits, private_bytes, hello })
    });
    child.kill()?;
    child.wait()?;
    sample
}

async fn receive_hello_async(stream: &mut tokio_vsock::VsockStream) -> Result<Hello> {
    let mut bytes = Vec::new();
    loop {
        if let Some((hello, _)) = decode_frame(&bytes, MAX_HELLO)? {
            return Ok(hello);
        }
        ensure!(stream.read_buf(&mut bytes).await? > 0, "the connection ended within the agent's hello");
    }
}

fn print_row(name: &str, samples: &[Sample]) {
    let used = |sample: &Sample| (sample.hello.memory_total_bytes - sample.hello.memory_available_bytes) as f64;
    println!(
        "{name:<14} {:>7.2} s {:>10} {:>12} {:>16} {:>18.1}",
        median(samples, |s| s.time.as_secs_f64()),
        median(samples, |s| s.exits.total as f64),
        median(samples, |s| s.exits.userspace as f64),
        median(samples, |s| s.private_bytes as f64) as u64 / 1024,
        median(samples, used) / f64::from(1 << 20),
    );
}

fn median(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> f64 {
    let mut values = samples.iter().map(value).collect::<Vec<_>>();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
