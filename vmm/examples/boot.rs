//! Boots a kernel and an initramfs with the real `isopod-vmm` and tells what happened and what it cost: for looking into a
//! boot that failed, and for measuring.
//!
//! `boot [options] VMLINUX INITRAMFS` with `--vcpus N`, `--memory MiB`, `--cmdline TEXT`, `--verbose`, `--disk FILE` (read-write),
//! `--add-disk FILE` (read-only, after the agent's hello), `--tap NAME`, `--seconds N` (deadline, default 60), `--keep` (run on
//! after the hello), `--vmm FILE` (default: beside this program's folder).

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use isopod_proto::vmm::control_reply::Reply;
use isopod_proto::vmm::control_request::Request;
use isopod_proto::vmm::{
    AddDisk, Console, ControlReply, ControlRequest, Disk, Info, NetworkInterface, Segment, Stop, VmConfig, VmExit,
    VmInfo,
};
use isopod_proto::{HELLO_PORT, MAX_CONTROL_MESSAGE, decode_frame, encode_frame};
use prost::Message;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

struct Options {
    files: Vec<PathBuf>,
    vcpus: u32,
    memory: u64,
    cmdline: String,
    verbose: bool,
    disks: Vec<PathBuf>,
    added_disk: Option<PathBuf>,
    tap: Option<String>,
    limit: Duration,
    keep: bool,
    vmm: PathBuf,
}

fn options() -> Outcome<Options> {
    let beside = std::env::current_exe()?.ancestors().nth(2).ok_or("no folder")?.join("isopod-vmm");
    let mut options = Options {
        files: vec![],
        vcpus: 1,
        memory: 128,
        cmdline: String::new(),
        verbose: false,
        disks: vec![],
        added_disk: None,
        tap: None,
        limit: Duration::from_secs(60),
        keep: false,
        vmm: beside,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--vcpus" => options.vcpus = value()?.parse()?,
            "--memory" => options.memory = value()?.parse()?,
            "--cmdline" => options.cmdline = value()?,
            "--verbose" => options.verbose = true,
            "--disk" => options.disks.push(value()?.into()),
            "--add-disk" => options.added_disk = Some(value()?.into()),
            "--tap" => options.tap = Some(value()?),
            "--seconds" => options.limit = Duration::from_secs(value()?.parse()?),
            "--keep" => options.keep = true,
            "--vmm" => options.vmm = value()?.into(),
            file => options.files.push(file.into()),
        }
    }
    if options.files.len() == 2 { Ok(options) } else { Err("usage: boot [options] VMLINUX INITRAMFS".into()) }
}

/// A running isopod-vmm, killed on drop.
struct Vmm {
    child: Child,
    control: PathBuf,
    vsock: PathBuf,
    record: File,
    started: Instant,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main() -> Outcome<()> {
    let options = options()?;
    let folder = tempfile::tempdir()?;
    let mut vmm = start(&options, folder.path())?;
    let hello = wait_for_hello(&mut vmm, options.limit)?;
    match hello {
        Some(after) => println!("hello from the agent after {:.3} s", after.as_secs_f64()),
        None => println!("no hello after {:.3} s", vmm.started.elapsed().as_secs_f64()),
    }
    if vmm.child.try_wait()?.is_none() {
        let info = info(&vmm)?;
        println!("user-space exits: {}; disks: {}", info.userspace_exits, info.disk_ids.join(" "));
        println!("private memory of the VMM without the guest's: {} KiB", private_kib(vmm.child.id(), options.memory)?);
        if let Some(disk) = &options.added_disk {
            add_disk(&vmm, disk)?;
            println!("added {}", disk.display());
        }
    }
    let mut shown = 0;
    while (options.keep || hello.is_none()) && vmm.child.try_wait()?.is_none() && vmm.started.elapsed() < options.limit
    {
        show_console(&vmm, &mut shown);
        std::thread::sleep(Duration::from_millis(100));
    }
    show_console(&vmm, &mut shown);
    if vmm.child.try_wait()?.is_none() {
        let _ = call(&vmm, Request::Stop(Stop {}), &[])?;
    }
    let status = vmm.child.wait()?;
    println!("\nended after {:.3} s: {status}", vmm.started.elapsed().as_secs_f64());
    let mut bytes = vec![];
    vmm.record.rewind()?;
    vmm.record.read_to_end(&mut bytes)?;
    if let Some((exit, _)) = decode_frame::<VmExit>(&bytes, MAX_CONTROL_MESSAGE)? {
        println!("{:?}: {}", exit.reason(), exit.message);
        print!("{}", String::from_utf8_lossy(&exit.console));
    }
    Ok(())
}

fn start(options: &Options, folder: &std::path::Path) -> Outcome<Vmm> {
    let (control, vsock) = (folder.join("control"), folder.join("vsock"));
    let record = File::options().read(true).write(true).create_new(true).open(folder.join("exit"))?;
    let mut inherited: Vec<OwnedFd> = vec![];
    let mut inherit = |fd: OwnedFd| -> Outcome<i32> {
        fcntl_setfd(&fd, FdFlags::empty())?;
        inherited.push(fd);
        Ok(inherited.last().map_or(-1, AsRawFd::as_raw_fd))
    };
    let mut config = VmConfig {
        vcpus: options.vcpus,
        memory_bytes: options.memory << 20,
        kernel_fd: inherit(File::open(&options.files[0])?.into())?,
        initramfs_fd: inherit(File::open(&options.files[1])?.into())?,
        cmdline: options.cmdline.clone(),
        control_fd: inherit(UnixListener::bind(&control)?.into())?,
        vsock_fd: inherit(UnixListener::bind(&vsock)?.into())?,
        guest_cid: 3,
        exit_fd: inherit(record.try_clone()?.into())?,
        verbose_console: options.verbose,
        ..VmConfig::default()
    };
    for (index, path) in options.disks.iter().enumerate() {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = file.metadata()?.len() / 512 * 512;
        let fd = inherit(file.into())?;
        let segments = vec![Segment { fd, offset: 0, length }];
        config.disks.push(Disk { id: format!("disk-{index}"), readonly: false, segments });
    }
    if let Some(tap) = &options.tap {
        let tap_fd = inherit(isopod_vmm::tap::open(tap)?)?;
        config.interfaces.push(NetworkInterface { tap_fd, mac: vec![2, 0, 0, 0, 0, 1], mtu: 1500 });
    }
    let (reader, mut writer) = std::io::pipe()?;
    let config_fd = inherit(reader.into())?;
    let started = Instant::now();
    let child = Command::new(&options.vmm).args(["--config-fd", &config_fd.to_string()]).spawn()?;
    writer.write_all(&config.encode_to_vec())?;
    drop(writer);
    Ok(Vmm { child, control, vsock, record, started })
}

/// Waits for the agent's connection, or for the VMM's end. How long it took.
fn wait_for_hello(vmm: &mut Vmm, limit: Duration) -> Outcome<Option<Duration>> {
    let mut stream = UnixStream::connect(&vmm.vsock)?;
    writeln!(stream, "ACCEPT {HELLO_PORT}")?;
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while vmm.started.elapsed() < limit && vmm.child.try_wait()?.is_none() {
        match reader.read_line(&mut line) {
            Ok(_) if line.starts_with("OK") => return Ok(Some(vmm.started.elapsed())),
            Ok(0) => return Ok(None),
            _ => {}
        }
    }
    Ok(None)
}

fn call(vmm: &Vmm, request: Request, files: &[File]) -> Outcome<Reply> {
    let mut stream = UnixStream::connect(&vmm.control)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let frame = encode_frame(&ControlRequest { request: Some(request) });
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err("too many descriptors".into());
    }
    sendmsg(&stream, &[IoSlice::new(&frame)], &mut ancillary, SendFlags::empty())?;
    let mut bytes = vec![];
    loop {
        if let Some((reply, _)) = decode_frame::<ControlReply>(&bytes, MAX_CONTROL_MESSAGE)? {
            return match reply.reply {
                Some(Reply::Error(error)) => Err(error.message.into()),
                Some(reply) => Ok(reply),
                None => Err("an empty reply".into()),
            };
        }
        let mut chunk = [0; 16384];
        let read = stream.read(&mut chunk)?;
        if read == 0 {
            return Err("the VMM closed the control connection".into());
        }
        bytes.extend_from_slice(&chunk[..read]);
    }
}

fn info(vmm: &Vmm) -> Outcome<VmInfo> {
    match call(vmm, Request::Info(Info {}), &[])? {
        Reply::Info(info) => Ok(info),
        other => Err(format!("{other:?}").into()),
    }
}

fn add_disk(vmm: &Vmm, path: &PathBuf) -> Outcome<()> {
    let file = File::open(path)?;
    let length = file.metadata()?.len() / 512 * 512;
    let disk = Disk { id: "added".into(), readonly: true, segments: vec![Segment { fd: 0, offset: 0, length }] };
    call(vmm, Request::AddDisk(AddDisk { disk: Some(disk) }), &[file]).map(drop)
}

/// Prints what is new on the console.
fn show_console(vmm: &Vmm, shown: &mut usize) {
    if let Ok(Reply::Console(console)) = call(vmm, Request::Console(Console {}), &[]) {
        print!("{}", String::from_utf8_lossy(console.bytes.get(*shown..).unwrap_or_default()));
        *shown = console.bytes.len();
        let _ = std::io::stdout().flush();
    }
}

/// KiB of private pages, without the mapping that is the guest's memory.
fn private_kib(pid: u32, memory_mib: u64) -> Outcome<u64> {
    let mut total = 0;
    let mut size = 0;
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(value)) = (words.next(), words.next().and_then(|value| value.parse::<u64>().ok())) else {
            continue;
        };
        match name {
            "Size:" => size = value,
            "Private_Clean:" | "Private_Dirty:" if size != memory_mib.min(3072) << 10 => total += value,
            _ => {}
        }
    }
    Ok(total)
}
