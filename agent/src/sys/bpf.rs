//! bpf(2), as far as the device controller of cgroup v2 needs it.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_TYPE_CGROUP_DEVICE: u32 = 6;
/// Programs of cgroups below are asked too.
const ALLOW_MULTI: u32 = 1 << 1;

/// How often a program is loaded that signals keep the kernel from verifying.
const ATTEMPTS: usize = 10;

/// One instruction, `struct bpf_insn` (linux/bpf.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// The destination register in the low four bits, the source register in the high ones.
    pub registers: u8,
    /// How far a jump goes, or where memory is read.
    pub offset: i16,
    /// The operand.
    pub immediate: i32,
}

/// Loads a program that is asked about each use of a device and attaches it to the cgroup whose directory `cgroup` is. It goes
/// with the cgroup.
///
/// # Errors
/// What bpf(2) gives: a program that the kernel's verifier refuses is `InvalidInput` or `PermissionDenied`.
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    let count = u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let load = Load {
        kind: PROG_TYPE_CGROUP_DEVICE,
        count,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let mut attempts = 1;
    let loaded = loop {
        // SAFETY: `load` is a prefix of union bpf_attr as BPF_PROG_LOAD reads it, and what it points to lives across the call: the
        // slice `program`, which has `count` elements, and a constant that ends with a NUL.
        let loaded = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) };
        if loaded != -1 {
            break loaded;
        }
        let error = io::Error::last_os_error();
        // The verifier gives up when a signal is pending for this thread (kernel/bpf/verifier.c, do_check).
        if error.kind() != io::ErrorKind::WouldBlock || attempts == ATTEMPTS {
            return Err(error);
        }
        attempts += 1;
    };
    let number = RawFd::try_from(loaded).expect("a descriptor is an int");
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    let loaded = unsafe { OwnedFd::from_raw_fd(number) };
    let number = |raw: RawFd| u32::try_from(raw).expect("an open descriptor is not negative");
    let attach = Attach {
        target: number(cgroup.as_raw_fd()),
        program: number(loaded.as_raw_fd()),
        kind: ATTACH_TYPE_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: `attach` is a prefix of union bpf_attr as BPF_PROG_ATTACH reads it; it holds no pointers.
    let attached = unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    if attached == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
