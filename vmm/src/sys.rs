//! All `unsafe` of the core: inherited descriptors, signals, and telling KVM about guest memory.
#![allow(unsafe_code, reason = "the one place of the crate's core that may")]

pub mod kick;
pub mod protection;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::virtio::GuestMemory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Takes ownership of the inherited descriptor `fd` and sets its close-on-exec flag. It must be open, above the standard
/// streams, and must not be taken twice: the caller keeps track of that.
pub fn take_inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: F_SETFD takes an integer and touches no memory; a number that is no descriptor gives EBADF.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, as fcntl has just shown, and the caller takes each number at most once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Blocks SIGTERM and SIGINT in this thread and those it starts, and returns a descriptor that is readable when one is pending.
pub fn termination_signals() -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain data for which all zeroes is a value; sigemptyset makes it the empty set.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid for writing.
    unsafe { libc::sigemptyset(&mut set) };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: `set` was initialised above; both are signal numbers.
        unsafe { libc::sigaddset(&mut set, signal) };
    }
    // SAFETY: `set` is initialised and the old mask is not asked for.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ends the process at once with `status`, and does nothing else.
pub fn exit_now(status: u8) -> ! {
    // SAFETY: it takes a number and does not return.
    unsafe { libc::_exit(status.into()) }
}

/// Lets an access to memory that is not there end the process at once, as what it is. std has a handler for it, which tells of stacks that
/// overflow; in a jail it would be killed for the system calls it makes, as if somebody had broken out.
pub fn let_faults_kill() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the default action is no handler, and both signals can have it.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Makes all threads share the allocator's first heap. It is the only one that grows and shrinks without a look at a file
/// (`/proc/sys/vm/overcommit_memory`), which a jail does not have, and nothing here allocates enough to contend for it.
pub fn use_one_heap() {
    // SAFETY: it takes numbers, and no other thread runs yet.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    debug_assert_eq!(set, 1, "glibc knows the option");
}

/// In unit tests, whose workers are confined as in a jail, it is done before there is a thread with a heap of its own.
// SAFETY: the loader calls what is in this section once, before main; the function does what any program may do then.
#[cfg(test)]
#[used]
#[unsafe(link_section = ".init_array")]
static IN_UNIT_TESTS: extern "C" fn() = {
    extern "C" fn start() {
        use_one_heap();
    }
    start
};

/// The slot of configuration space: those before it are the guest's memory, which has at most two regions and a reserve.
const CONFIG_SLOT: u32 = 3;

/// Shows `memory` to the guests of `vm`, one slot a region. No vCPU may run when `memory` goes: the caller keeps both.
pub fn map_guest_memory(vm: &VmFd, memory: &GuestMemory) -> io::Result<()> {
    map(vm, memory, 0, 0)
}

/// Shows `memory` to the guests of `vm` for reading; a write is an exit. As above, and once in a VM.
pub fn map_configuration_space(vm: &VmFd, memory: &GuestMemory) -> io::Result<()> {
    map(vm, memory, CONFIG_SLOT, KVM_MEM_READONLY)
}

fn map(vm: &VmFd, memory: &GuestMemory, first_slot: u32, flags: u32) -> io::Result<()> {
    for (slot, region) in (first_slot..).zip(memory.iter()) {
        let mapping = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.get_mmap().as_ptr() as u64,
        };
        // SAFETY: the range is a live private mapping of exactly this size, which only goes when `memory`'s last clone does.
        unsafe { vm.set_user_memory_region(mapping) }?;
    }
    Ok(())
}
