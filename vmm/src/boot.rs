//! Getting Linux into memory and the boot CPU to its first instruction, by the 64-bit boot protocol
//! (Linux `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol"): no firmware, no real mode.

mod cpu_state;
mod image;
mod params;

pub use cpu_state::{CpuStateError, set_up_boot_cpu, set_up_msrs};
pub use image::ImageError;
pub use params::command_line;

use std::fs::File;

use isopod_proto::ErrorKind;
use vm_memory::GuestAddress;

use crate::virtio::GuestMemory;

/// What is booted.
pub struct BootSource<'a> {
    /// An uncompressed ELF vmlinux.
    pub kernel: &'a File,
    /// An initramfs, possibly compressed.
    pub initramfs: &'a File,
    /// The whole command line.
    pub cmdline: &'a str,
}

/// Why the guest's memory could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel or the initramfs does not do.
    #[error("the {what} cannot be loaded")]
    Image {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// The command line is too long or has bytes that end it.
    #[error("the kernel command line of {length} bytes is longer than {limit} or has a NUL in it")]
    CommandLine {
        /// Its bytes.
        length: usize,
        /// The most it may have.
        limit: usize,
    },
    /// Guest memory refuses a write at an address of the fixed layout.
    #[error("cannot write the boot parameters")]
    Write(#[source] vm_memory::GuestMemoryError),
}

impl BootError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Image { source, .. } => source.kind(),
            Self::CommandLine { .. } => ErrorKind::InvalidArgument,
            Self::Write(_) => ErrorKind::Internal,
        }
    }
}

/// Loads kernel, initramfs and boot parameters into `memory` and returns the kernel's entry point.
pub fn load(memory: &GuestMemory, source: &BootSource) -> Result<GuestAddress, BootError> {
    let kernel =
        image::load_kernel(memory, source.kernel).map_err(|source| BootError::Image { what: "kernel", source })?;
    let initramfs = image::load_initramfs(memory, source.initramfs, kernel.end)
        .map_err(|source| BootError::Image { what: "initramfs", source })?;
    params::write(memory, source.cmdline, &initramfs)?;
    Ok(kernel.entry)
}
