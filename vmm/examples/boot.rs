//! Boots a kernel and an initramfs with the real `isopod-vmm` and tells what happened and what it cost: for looking into a
//! boot that failed, and for measuring.
//!
//! `boot [options] VMLINUX INITRAMFS`, where the options are
//!
//! * `--vcpus N`, `--memory MiB`, `--cmdline TEXT`, `--verbose`: as in the configuration;
//! * `--disk FILE`: a read-write disk; may be repeated;
//! * `--add-disk FILE`: a read-only disk, added when the console shows `ADD DISK`, removed when it shows `REMOVE DISK`;
//! * `--tap NAME`: a network interface;
//! * `--seconds N`: a deadline (default 60); `--keep`: run on after the agent's hello;
//! * `--vmm FILE`: the `isopod-vmm` (default: in the folder above this program's).

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
    self as wire, AddDisk, ControlReply, ControlRequest, Disk, Info, NetworkInterface, RemoveDisk, Segment, Stop, User,
    VmConfig, VmExit, VmInfo,
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
    let mut hello = BufReader::new(UnixStream::connect(&vmm.vsock)?);
    writeln!(hello.get_mut(), "ACCEPT {HELLO_PORT}")?;
    hello.get_mut().set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut console = Console::default();
    let mut seen = false;
    while vmm.child.try_wait()?.is_none() && vmm.started.elapsed() < options.limit {
        if !seen && hello_is_there(&mut hello) {
            seen = true;
            println!("hello from the agent after {:.3} s", vmm.started.elapsed().as_secs_f64());
            show_costs(&vmm, options.memory)?;
            if !options.keep {
                break;
            }
        }
        // Errors: the VM has just ended.
        let _ = console.show(&vmm);
        if let Some(disk) = options.added_disk.as_ref().filter(|_| console.shows_for_the_first_time("ADD DISK")) {
            add_disk(&vmm, disk)?;
            println!("[added {}]", disk.display());
        }
        if console.shows_for_the_first_time("REMOVE DISK") {
            call(&vmm, Request::RemoveDisk(RemoveDisk { id: "added".into() }), &[])?;
            println!("[removed it]");
        }
    }
    end(vmm, &mut console, options.memory)
}

/// Shows what is left on the console, stops the VM if it runs, and tells how it ended.
fn end(mut vmm: Vmm, console: &mut Console, memory: u64) -> Outcome<()> {
    if vmm.child.try_wait()?.is_none() {
        console.show(&vmm)?;
        show_costs(&vmm, memory)?;
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

fn show_costs(vmm: &Vmm, memory: u64) -> Outcome<()> {
    let info = info(vmm)?;
    println!("user-space exits: {}; disks: {}", info.userspace_exits, info.disk_ids.join(" "));
    println!("private memory of the VMM without the guest's: {} KiB", private_kib(vmm.child.id(), memory)?);
    Ok(())
}

/// The VM's console as far as it was shown, and which words in it were reacted to.
#[derive(Default)]
struct Console {
    text: String,
    done: Vec<&'static str>,
}

impl Console {
    /// Prints what is new.
    fn show(&mut self, vmm: &Vmm) -> Outcome<()> {
        if let Reply::Console(console) = call(vmm, Request::Console(wire::Console {}), &[])? {
            let text = String::from_utf8_lossy(&console.bytes).into_owned();
            print!("{}", text.get(self.text.len()..).unwrap_or_default());
            self.text = text;
            std::io::stdout().flush()?;
        }
        Ok(())
    }

    fn shows_for_the_first_time(&mut self, word: &'static str) -> bool {
        let now = self.text.contains(word) && !self.done.contains(&word);
        if now {
            self.done.push(word);
        }
        now
    }
}

/// Whether the agent has connected.
fn hello_is_there(from: &mut BufReader<UnixStream>) -> bool {
    let mut line = String::new();
    from.read_line(&mut line).is_ok() && line.starts_with("OK")
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
        user: Some(User { uid: 0x7000_0000, gid: 0x7000_0000 }),
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
