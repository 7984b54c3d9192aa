//! One VM put together: KVM, memory, vCPUs, the bus and the devices on it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use isopod_proto::{DiskId, ErrorKind};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootError, BootSource, CpuStateError};
use crate::config::{Config, DiskConfig};
use crate::devices::Starter;
use crate::devices::balloon::Balloon;
use crate::devices::block::{Block, BlockError};
use crate::devices::fs::{Fs, FsError};
use crate::devices::mem::{Mem, MemControl, MemError};
use crate::devices::net::{Net, NetError};
use crate::devices::rng::{Rng, RngError};
use crate::devices::vsock::{Vsock, VsockError};
use crate::exit::{Exit, Reason};
use crate::io_bus::IoBus;
use crate::irq::{InterruptRoutes, KvmVectors};
use crate::kvm::CheckedKvm;
use crate::memory::{self, MemoryError};
use crate::pci::{ConfigWindow, FunctionNumber, HostBridge, Notifications, PciBus, PciError, VirtioFunction};
use crate::serial::{ConsoleRing, SerialConsole, SerialInterrupt};
use crate::vcpu::{VcpuError, VcpuSet};
use crate::virtio::{GuestMemory, VirtioDevice};
use crate::{acpi, cpuid, layout, sys};

/// Why a VM could not be made, or a request to it not be done.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A step of making the VM fails.
    #[error("KVM refuses to {0}")]
    Refused(&'static str, #[source] io::Error),
    /// No memory for the guest.
    #[error("cannot give the guest its memory")]
    Memory(#[source] MemoryError),
    /// The kernel cannot be booted.
    #[error("cannot prepare the boot")]
    Boot(#[source] BootError),
    /// The guest's memory refuses the ACPI tables.
    #[error("cannot write the ACPI tables")]
    Acpi(#[source] vm_memory::GuestMemoryError),
    /// A CPU's state is refused.
    #[error("cannot set up vCPU {0}")]
    Cpu(u8, #[source] CpuStateError),
    /// The thread that starts others.
    #[error("cannot start the thread that starts the devices' workers")]
    Starter(#[source] io::Error),
    /// The threads.
    #[error("cannot run the vCPUs")]
    Vcpus(#[source] VcpuError),
    /// A disk.
    #[error("cannot make disk {0}")]
    Disk(DiskId, #[source] BlockError),
    /// A file system.
    #[error("cannot make file system {0:?}")]
    FileSystem(String, #[source] FsError),
    /// A network interface.
    #[error("cannot make a network interface")]
    Net(#[source] NetError),
    /// The vsock device.
    #[error("cannot make the vsock device")]
    Vsock(#[source] VsockError),
    /// A size that the VM cannot have.
    #[error("a VM that has been made with {made} bytes of memory cannot have {wanted}")]
    Size {
        /// What it has at the least.
        made: u64,
        /// What it was to have.
        wanted: u64,
        /// Why not, unless it is less.
        #[source]
        source: Option<MemError>,
    },
    /// The entropy device.
    #[error("cannot make the entropy device")]
    Rng(#[source] RngError),
    /// The bus is full.
    #[error("cannot add {0} to the bus")]
    Bus(String, #[source] PciError),
    /// A disk id is in use.
    #[error("disk {0} is there already")]
    DiskExists(DiskId),
    /// A tag is in use.
    #[error("file system {0:?} is there already")]
    FileSystemExists(String),
    /// A disk id is not in use.
    #[error("there is no disk {0}")]
    NoDisk(DiskId),
}

impl MachineError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Memory(error) => error.kind(),
            Self::Boot(error) => error.kind(),
            Self::Disk(_, error) => error.kind(),
            Self::Net(error) => error.kind(),
            Self::Vsock(error) => error.kind(),
            Self::Rng(error) => error.kind(),
            Self::Bus(_, error) => error.kind(),
            Self::FileSystem(_, error) => error.kind(),
            Self::Size { .. } => ErrorKind::InvalidArgument,
            Self::DiskExists(_) | Self::FileSystemExists(_) => ErrorKind::AlreadyExists,
            Self::NoDisk(_) => ErrorKind::NotFound,
            Self::Refused(..) | Self::Acpi(_) | Self::Cpu(..) | Self::Starter(_) | Self::Vcpus(_) => {
                ErrorKind::Internal
            }
        }
    }

    /// How a VM that could not be made ends.
    pub fn reason(&self) -> Reason {
        match self {
            _ if self.kind() == ErrorKind::InvalidArgument => Reason::BadConfig,
            _ => Reason::Internal,
        }
    }
}

/// How large a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Processors.
    pub vcpus: u8,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// A VM that runs, or is paused.
pub struct Machine {
    // Fields are dropped in this order: first nothing runs in the guest any more, then its devices stop.
    vcpus: VcpuSet,
    pci: Arc<Mutex<PciBus>>,
    builder: FunctionBuilder,
    disks: Vec<(DiskId, FunctionNumber)>,
    /// The tags of the file systems.
    file_systems: Vec<String>,
    console: ConsoleRing,
    /// Its size at its boot.
    made: Size,
    /// What has more memory for it; `None`: there is none.
    mem: Option<MemControl>,
}

impl Machine {
    /// Makes the VM that `config` describes and lets it run. `console` gets what the guest prints. The descriptors that a running
    /// VM does not need are closed before it runs.
    pub fn start(config: Config, checked: CheckedKvm, console: ConsoleRing) -> Result<Self, MachineError> {
        let ram = memory::allocate(config.memory_bytes).map_err(MachineError::Memory)?;
        let (memory, mem) = match config.reserve {
            Some(reserve) => {
                let (memory, backing) = memory::with_reserve(&ram, reserve).map_err(MachineError::Memory)?;
                (memory, Some(Mem::new(reserve.start, reserve.length, backing)))
            }
            None => (ram.clone(), None),
        };
        let vm = create_vm(&checked, &memory)?;
        let routes = InterruptRoutes::new(Arc::clone(&vm));
        let serial = routes.pin(layout::SERIAL_IRQ).map_err(refused("connect the serial port's interrupt"))?;
        let serial = SerialConsole::new(SerialInterrupt(serial), console.clone());

        let cmdline = boot::command_line(config.verbose_console, config.vcpus, &config.cmdline);
        let source = BootSource { kernel: &config.kernel, initramfs: &config.initramfs, cmdline: &cmdline };
        let entry = boot::load(&ram, &source).map_err(MachineError::Boot)?;
        ram.write_slice(&acpi::tables(config.max_vcpus), GuestAddress(layout::ACPI_TABLES))
            .map_err(MachineError::Acpi)?;
        let vcpus = create_vcpus(&vm, &checked, config.max_vcpus)?;
        boot::set_up_boot_cpu(&vcpus[0], &ram, entry).map_err(|error| MachineError::Cpu(0, error))?;

        let mut bus = PciBus::new(Box::new(HostBridge::new()));
        show_configuration(&mut bus, &vm, &checked)?;
        let starter = Arc::new(Starter::start().map_err(MachineError::Starter)?);
        let builder = FunctionBuilder { vm, memory, routes, starter };
        let disks = add_devices(&mut bus, &builder, config.devices)?;
        let control = mem.as_ref().map(Mem::control);
        if let Some(mem) = mem {
            builder.add(&mut bus, Box::new(mem))?;
        }
        let pci = Arc::new(Mutex::new(bus));
        let io_bus = Arc::new(IoBus::new(serial, Arc::clone(&pci)));
        let made = Size { vcpus: config.vcpus, memory_bytes: config.memory_bytes };
        drop((checked, config.kernel, config.initramfs, config.control));
        let vcpus = VcpuSet::start(vcpus, io_bus).map_err(MachineError::Vcpus)?;
        Ok(Self { vcpus, pci, builder, disks, file_systems: vec![], console, made, mem: control })
    }

    /// Adds a disk; the guest finds it when it rescans the bus.
    pub fn add_disk(&mut self, disk: DiskConfig) -> Result<(), MachineError> {
        if self.disks.iter().any(|(id, _)| *id == disk.id) {
            return Err(MachineError::DiskExists(disk.id));
        }
        let id = disk.id.clone();
        let device = block(disk)?;
        // The eventfds and routes of the new function come into being when its driver starts it, not under this lock.
        let number = self.builder.add(&mut self.pci.lock(), device)?;
        self.disks.push((id, number));
        Ok(())
    }

    /// Takes a disk away. A driver that still drives it finds it gone; its requests in flight are finished first.
    pub fn remove_disk(&mut self, id: &DiskId) -> Result<(), MachineError> {
        let position = self.disks.iter().position(|(disk, _)| disk == id);
        let position = position.ok_or_else(|| MachineError::NoDisk(id.clone()))?;
        let (_, number) = self.disks.remove(position);
        let function = self.pci.lock().remove(number);
        // Outside of the lock: dropping joins the worker, which may wait for the disk.
        drop(function);
        Ok(())
    }

    /// Adds a file system that `socket` leads to; the guest finds it when it rescans the bus. It stays until the VM's end.
    pub fn add_file_system(&mut self, tag: &str, socket: OwnedFd) -> Result<(), MachineError> {
        if self.file_systems.iter().any(|other| other == tag) {
            return Err(MachineError::FileSystemExists(tag.to_owned()));
        }
        let shown = || tag.chars().take(64).collect();
        let device = Fs::new(tag, socket).map_err(|error| MachineError::FileSystem(shown(), error))?;
        self.builder.add(&mut self.pci.lock(), Box::new(device))?;
        self.file_systems.push(tag.to_owned());
        Ok(())
    }

    /// The ids of the disks, in the order in which they were added.
    pub fn disk_ids(&self) -> impl Iterator<Item = &DiskId> {
        self.disks.iter().map(|(id, _)| id)
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &VcpuSet {
        &self.vcpus
    }

    /// Asks the guest to have `bytes` of memory in all, and returns at once.
    pub fn resize_memory(&self, bytes: u64) -> Result<(), MachineError> {
        let made = self.made.memory_bytes;
        let refused = |source| MachineError::Size { made, wanted: bytes, source };
        let more = bytes.checked_sub(made).ok_or_else(|| refused(None))?;
        match &self.mem {
            Some(mem) => mem.request(more).map_err(|error| refused(Some(error))),
            None if more == 0 => Ok(()),
            None => Err(refused(None)),
        }
    }

    /// Its size at its boot, which it has at the least.
    pub fn made(&self) -> Size {
        self.made
    }

    /// The vCPUs that the guest was brought up with, and the memory that it has now.
    pub fn size(&self) -> Size {
        let more = self.mem.as_ref().map_or(0, MemControl::plugged_bytes);
        Size { memory_bytes: self.made.memory_bytes + more, ..self.made }
    }

    /// What the guest can have.
    pub fn largest_size(&self) -> Size {
        let more = self.mem.as_ref().map_or(0, MemControl::most_bytes);
        Size { vcpus: self.vcpus.count() as u8, memory_bytes: self.made.memory_bytes + more }
    }

    /// What the guest printed.
    pub fn console(&self) -> &ConsoleRing {
        &self.console
    }

    /// Stops vCPUs, then devices. If the VM had ended by itself, that is returned.
    pub fn stop(mut self) -> Option<Exit> {
        self.vcpus.stop();
        self.pci.lock().clear();
        self.vcpus.exit()
    }
}

fn refused<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> MachineError {
    move |error| MachineError::Refused(what, error.into())
}

fn create_vm(checked: &CheckedKvm, memory: &GuestMemory) -> Result<Arc<VmFd>, MachineError> {
    let vm = checked.kvm.create_vm().map_err(refused("create a VM"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(refused("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(refused("place its task state segment"))?;
    vm.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
    sys::map_guest_memory(&vm, memory).map_err(refused("map the guest's memory"))?;
    Ok(Arc::new(vm))
}

fn create_vcpus(vm: &VmFd, checked: &CheckedKvm, count: u8) -> Result<Vec<VcpuFd>, MachineError> {
    (0..count)
        .map(|index| {
            let vcpu = vm.create_vcpu(index.into()).map_err(refused("create a vCPU"))?;
            vcpu.set_cpuid2(&cpuid::for_vcpu(&checked.cpuid, index, count)).map_err(refused("set a vCPU's CPUID"))?;
            boot::set_up_msrs(&vcpu).map_err(|error| MachineError::Cpu(index, error))?;
            Ok(vcpu)
        })
        .collect()
}

/// Lets the guest read configuration space as memory. Where KVM cannot do that, each read is an exit that the bus answers.
fn show_configuration(bus: &mut PciBus, vm: &VmFd, checked: &CheckedKvm) -> Result<(), MachineError> {
    if checked.kvm.check_extension(Cap::ReadonlyMem) {
        let failed = |source| MachineError::Memory(MemoryError::Map { bytes: layout::ECAM_SIZE, source });
        let window = ConfigWindow::new().map_err(failed)?;
        sys::map_configuration_space(vm, window.memory()).map_err(refused("show configuration space"))?;
        bus.show_in(window);
    }
    Ok(())
}

/// Puts the devices that `devices` asks for on the bus, and returns the disks' places.
fn add_devices(
    bus: &mut PciBus,
    builder: &FunctionBuilder,
    devices: crate::config::Devices,
) -> Result<Vec<(DiskId, FunctionNumber)>, MachineError> {
    let crate::config::Devices { vsock, guest_cid, disks, interfaces } = devices;
    builder.add(bus, Box::new(Rng::new().map_err(MachineError::Rng)?))?;
    builder.add(bus, Box::new(Balloon::default()))?;
    builder.add(bus, Box::new(Vsock::new(vsock, guest_cid).map_err(MachineError::Vsock)?))?;
    for interface in interfaces {
        let net = Net::new(interface.tap, interface.mac, interface.mtu).map_err(MachineError::Net)?;
        builder.add(bus, Box::new(net))?;
    }
    disks
        .into_iter()
        .map(|disk| {
            let id = disk.id.clone();
            Ok((id, builder.add(bus, block(disk)?)?))
        })
        .collect()
}

fn block(disk: DiskConfig) -> Result<Box<dyn VirtioDevice>, MachineError> {
    let DiskConfig { id, readonly, segments } = disk;
    let block = Block::new(id.clone(), readonly, segments).map_err(|error| MachineError::Disk(id, error))?;
    Ok(Box::new(block))
}

/// Makes PCI functions of devices.
struct FunctionBuilder {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    routes: Arc<InterruptRoutes>,
    starter: Arc<Starter>,
}

impl FunctionBuilder {
    fn add(&self, bus: &mut PciBus, device: Box<dyn VirtioDevice>) -> Result<FunctionNumber, MachineError> {
        let number = bus.free_place().map_err(|error| MachineError::Bus(device.name(), error))?;
        let vectors = Box::new(KvmVectors::new(Arc::clone(&self.routes)));
        let notifications = Box::new(KvmNotifications(Arc::clone(&self.vm)));
        let function = VirtioFunction::new(
            device,
            self.memory.clone(),
            Arc::clone(&self.starter),
            number.initial_bar(),
            vectors,
            notifications,
        );
        bus.insert(number, Box::new(function));
        Ok(number)
    }
}

/// Notifications by ioeventfd: the guest's write wakes the device's worker without a return to user space.
struct KvmNotifications(Arc<VmFd>);

impl Notifications for KvmNotifications {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(io::Error::from)
    }

    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(io::Error::from)
    }
}
