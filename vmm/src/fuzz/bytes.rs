//! What is read without a device: registers, the configuration, and the control connection.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use isopod_proto::vmm::control_reply::Reply;
use isopod_proto::vmm::control_request::Request;
use isopod_proto::vmm::{AddDisk, ConsoleContents, ControlReply, Done, VmConfig};
use parking_lot::Mutex;
use prost::Message;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::{bus, memory};
use crate::config::{Config, DiskConfig};
use crate::control::connection::{Connection, Descriptors};
use crate::devices::block::Block;
use crate::devices::rng::Rng;
use crate::devices::worker::inline;
use crate::io_bus::IoBus;
use crate::layout;
use crate::serial::{ConsoleRing, SerialConsole, SerialInterrupt};
use crate::virtio::VirtioDevice;

/// An access of a vCPU.
#[derive(Debug, Arbitrary)]
enum Access {
    PortIn { port: u16, width: u8 },
    PortOut { port: u16, data: Vec<u8> },
    Serial { register: u8, value: u8 },
    Config { write: bool, function: u8, offset: u16, width: u8, value: u32 },
    Memory { write: bool, offset: u32, width: u8, value: u64 },
    Anywhere { write: bool, address: u64, width: u8, value: u64 },
}

/// Any accesses to ports, configuration space and BARs, of two devices.
pub fn registers(input: &[u8]) {
    let memory = memory();
    let device = || Box::new(Rng::new().expect("there are random numbers")) as Box<dyn VirtioDevice>;
    let pci = Arc::new(Mutex::new(bus(vec![device(), device()], &memory)));
    let ring = ConsoleRing::default();
    let interrupt = SerialInterrupt(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    let registers = IoBus::new(SerialConsole::new(interrupt, ring.clone()), pci);
    let mut input = Unstructured::new(input);
    while !input.is_empty() {
        let Ok(access) = Access::arbitrary(&mut input) else { break };
        act(&registers, access);
        inline::run();
    }
    assert!(ring.contents().len() <= isopod_proto::CONSOLE_RING_BYTES);
}

fn act(registers: &IoBus, access: Access) {
    let (write, address, width, value) = match access {
        Access::PortIn { port, width } => {
            return registers.port_in(port, &mut vec![0; width.into()]);
        }
        Access::PortOut { port, data } => return drop(registers.port_out(port, &data)),
        Access::Serial { register, value } => {
            registers.port_in(layout::SERIAL_PORT + u16::from(register % 8), &mut [0]);
            return drop(registers.port_out(layout::SERIAL_PORT + u16::from(register % 8), &[value]));
        }
        Access::Config { write, function, offset, width, value } => {
            let address = layout::ECAM + (u64::from(function % 32) << 12) + u64::from(offset % 4096);
            (write, address, width % 4, value.into())
        }
        Access::Memory { write, offset, width, value } => {
            (write, layout::PCI_WINDOW + u64::from(offset % 0x4_0000), width % 8, value)
        }
        Access::Anywhere { write, address, width, value } => (write, address, width % 8, value),
    };
    let mut data = value.to_le_bytes();
    let data = &mut data[..=usize::from(width)];
    if write { registers.memory_write(address, data) } else { registers.memory_read(address, data) }
}

fn disk_file() -> File {
    let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&file, 1 << 20).expect("it grows");
    file.into()
}

/// A disk of a request, with a file or two.
fn add_disk(disk: isopod_proto::vmm::Disk, files: &[File]) {
    if let Ok(DiskConfig { id, readonly, segments }) = DiskConfig::from_request(disk, files) {
        drop(Block::new(id, readonly, segments));
    }
}

/// The configuration that a VMM reads when it starts. Descriptors that it names are made such that there are none: the
/// fuzzer's own must not be taken.
pub fn config(input: &[u8]) {
    let Ok(mut wire) = VmConfig::decode(input) else { return };
    let nobodys = |fd: &mut i32| *fd = 1_000_000 + fd.rem_euclid(16);
    let fixed =
        [&mut wire.kernel_fd, &mut wire.initramfs_fd, &mut wire.control_fd, &mut wire.vsock_fd, &mut wire.exit_fd];
    fixed.into_iter().for_each(nobodys);
    wire.interfaces.iter_mut().for_each(|interface| nobodys(&mut interface.tap_fd));
    for disk in &wire.disks {
        add_disk(disk.clone(), &[disk_file(), disk_file()]);
    }
    wire.disks.iter_mut().flat_map(|disk| &mut disk.segments).for_each(|segment| nobodys(&mut segment.fd));
    assert!(Config::from_wire(wire).is_err(), "a configuration without its descriptors");
}

/// The bytes of a client of the control socket, in pieces.
pub fn control(input: &[u8]) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let mut connection = Connection::new(theirs).expect("a connection");
    ours.set_nonblocking(true).expect("it is a socket");
    let (first, rest) = input.split_at(input.len() / 2);
    for piece in [first, rest, &[]] {
        let _ = (&ours).write(piece);
        let open = connection.serve(answer);
        let _ = (&ours).read(&mut [0; 65536]);
        if !open {
            return;
        }
    }
}

fn answer(request: isopod_proto::vmm::ControlRequest, files: &mut Descriptors) -> ControlReply {
    let reply = match request.request {
        Some(Request::AddDisk(AddDisk { disk: Some(disk) })) => {
            add_disk(disk, &[disk_file()]);
            Reply::Done(Done {})
        }
        Some(Request::Console(_)) => Reply::Console(ConsoleContents { bytes: vec![b'x'; 1000] }),
        _ => {
            drop(files.take(1));
            Reply::Done(Done {})
        }
    };
    ControlReply { reply: Some(reply) }
}
