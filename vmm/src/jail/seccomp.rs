//! The system calls that each kind of thread may make.
//!
//! The lists are made from what the code calls, and std and glibc for it. A call that is missing kills the VMM by SIGSYS, as the
//! daemon's log tells; the kernel's names the call (`audit: type=1326 ... syscall=N`).
//!
//! A filter belongs to the process, so its state does, too: once [`prepare`] was called, as in a jail, [`confine`] confines.

use std::io;
use std::sync::OnceLock;

use isopod_jail::seccomp::{Allowed, Filter, lists};
use libc::*;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The first one while it starts the vCPUs: everything that those may.
    Start,
    /// The first one from then on: it serves the control socket.
    Main,
    /// A vCPU's. It wires devices, and has their workers started, when the guest's driver is ready.
    Vcpu,
    /// The one that starts the devices' workers: everything that those may.
    Starter,
    /// The worker of the balloon, which gives pages back as allocators do.
    Balloon,
    /// The worker of a disk.
    Block,
    /// The worker of a file system.
    FileSystem,
    /// The worker of the memory device, which changes who can access memory, as allocators do.
    Mem,
    /// The worker of a network interface.
    Net,
    /// The worker of the entropy device.
    Rng,
    /// The worker of the socket device.
    Vsock,
}

/// ioctls of KVM's descriptors (KVM API, section 4).
mod kvm {
    use kvm_bindings::{KVMIO, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd, kvm_regs, kvm_sregs};
    use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

    /// The number of ioctl `number` of KVM, whose argument is a `T`.
    const fn ioctl<T>(direction: u32, number: u32) -> u32 {
        ioctl_expr(direction as _, KVMIO as _, number as _, size_of::<T>() as _) as u32
    }

    pub const RUN: u32 = ioctl::<()>(_IOC_NONE, 0x80);
    pub const KVMCLOCK_CTRL: u32 = ioctl::<()>(_IOC_NONE, 0xad);
    pub const GET_REGS: u32 = ioctl::<kvm_regs>(_IOC_READ, 0x81);
    pub const GET_SREGS: u32 = ioctl::<kvm_sregs>(_IOC_READ, 0x83);
    pub const IOEVENTFD: u32 = ioctl::<kvm_ioeventfd>(_IOC_WRITE, 0x79);
    pub const IRQFD: u32 = ioctl::<kvm_irqfd>(_IOC_WRITE, 0x76);
    pub const SET_GSI_ROUTING: u32 = ioctl::<kvm_irq_routing>(_IOC_WRITE, 0x6a);
}

/// What every worker does: waits for events, tells the guest by an eventfd.
fn worker() -> Allowed {
    lists::any_thread().calls(&[SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_ctl])
}

fn block() -> Allowed {
    worker().calls(&[SYS_preadv, SYS_pwritev, SYS_pwrite64, SYS_fallocate, SYS_fdatasync])
}

fn net() -> Allowed {
    worker().calls(&[SYS_writev])
}

fn stream() -> Allowed {
    worker().calls(&[SYS_recvfrom, SYS_sendto])
}

fn vsock() -> Allowed {
    stream().calls(&[SYS_accept4, SYS_shutdown]).with(SYS_ioctl, 1, &[FIONBIO as u32])
}

/// Connecting and disconnecting interrupts and notifications of devices.
fn wires_devices() -> Allowed {
    Allowed::default().with(SYS_ioctl, 1, &[kvm::IOEVENTFD, kvm::IRQFD, kvm::SET_GSI_ROUTING])
}

fn vcpu() -> Allowed {
    let requests = [kvm::RUN, kvm::KVMCLOCK_CTRL, kvm::GET_REGS, kvm::GET_SREGS, TUNSETOFFLOAD as u32];
    lists::any_thread()
        .calls(&[SYS_eventfd2])
        .with(SYS_fcntl, 1, &[F_DUPFD_CLOEXEC as u32])
        .with(SYS_ioctl, 1, &requests)
        .and(&wires_devices())
}

fn starter() -> Allowed {
    let own = lists::any_thread().calls(&[SYS_eventfd2, SYS_epoll_create1]);
    [lists::starting_threads(), block(), net(), stream(), vsock()].iter().fold(own, Allowed::and)
}

fn main() -> Allowed {
    let pid = rustix::process::getpid().as_raw_pid() as u32;
    lists::any_thread()
        .calls(&[SYS_poll, SYS_ppoll, SYS_accept4, SYS_recvmsg, SYS_sendto, SYS_lseek])
        .with(SYS_fcntl, 1, &[F_DUPFD_CLOEXEC as u32])
        .with(SYS_ioctl, 1, &[FIONBIO as u32])
        .and(&wires_devices())
        // Is it a socket that is to lead to a file server?
        .with(SYS_getsockopt, 2, &[SO_TYPE as u32])
        // Kicks vCPUs.
        .with(SYS_tgkill, 0, &[pid])
}

impl Thread {
    const ALL: [Self; 11] = [
        Self::Start,
        Self::Main,
        Self::Vcpu,
        Self::Starter,
        Self::Balloon,
        Self::Block,
        Self::FileSystem,
        Self::Mem,
        Self::Net,
        Self::Rng,
        Self::Vsock,
    ];

    fn allowed(self) -> Allowed {
        match self {
            Self::Start => main().and(&vcpu()).and(&lists::starting_threads()),
            Self::Main => main(),
            Self::Vcpu => vcpu(),
            Self::Starter => starter(),
            Self::Block => block(),
            Self::FileSystem => stream(),
            Self::Net => net(),
            Self::Balloon | Self::Mem | Self::Rng => worker(),
            Self::Vsock => vsock(),
        }
    }
}

/// The filters, once there is a jail.
static FILTERS: OnceLock<Vec<(Thread, Filter)>> = OnceLock::new();

/// Compiles the filters, with which [`confine`] confines from now on.
pub fn prepare() {
    FILTERS.get_or_init(|| Thread::ALL.map(|thread| (thread, thread.allowed().or_kill())).into());
}

/// Puts the calling thread under the filter of its kind; without a jail, as in unit tests, it does nothing.
pub fn confine(thread: Thread) -> io::Result<()> {
    let Some(filters) = FILTERS.get() else { return Ok(()) };
    if matches!(thread, Thread::Start | Thread::Starter) {
        lists::no_clone3().apply()?;
    }
    filters.iter().filter(|(kind, _)| *kind == thread).try_for_each(|(_, filter)| filter.apply())
}

/// The same for a thread that has just started.
///
/// # Panics
///
/// If the kernel refuses, which it did not for the thread that started this one: it must not run unconfined.
pub fn confine_started(thread: Thread) {
    confine(thread).expect("the kernel takes a filter that is valid");
}
