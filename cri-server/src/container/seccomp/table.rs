//! Names of system calls and their numbers.

use syscalls::{aarch64, arm, mips64, powerpc64, riscv64, s390x, x86, x86_64};

/// An architecture whose programs run in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// x86-64.
    X86_64,
    /// 32-bit programs, i386.
    X86,
}

impl Architecture {
    /// Its AUDIT_ARCH_ value (linux/audit.h).
    pub fn audit(self) -> u32 {
        match self {
            Self::X86_64 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
        }
    }

    /// The number that the system call `name` has, if it has one.
    pub fn number(self, name: &str) -> Option<u32> {
        let number = match self {
            Self::X86_64 => name.parse::<x86_64::Sysno>().ok()?.id(),
            Self::X86 => name.parse::<x86::Sysno>().ok()?.id(),
        };
        u32::try_from(number).ok()
    }
}

/// Whether some architecture has a system call of this name. Profiles name those of all of them.
pub fn exists(name: &str) -> bool {
    Architecture::X86_64.number(name).is_some()
        || Architecture::X86.number(name).is_some()
        || name.parse::<aarch64::Sysno>().is_ok()
        || name.parse::<arm::Sysno>().is_ok()
        || name.parse::<mips64::Sysno>().is_ok()
        || name.parse::<powerpc64::Sysno>().is_ok()
        || name.parse::<riscv64::Sysno>().is_ok()
        || name.parse::<s390x::Sysno>().is_ok()
}
