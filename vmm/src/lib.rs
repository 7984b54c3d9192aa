//! One microVM on KVM: the machine, its devices, and the control socket through which the daemon drives it.
//!
//! A process of `isopod-vmm` is one VM. There is no async code: one event-loop thread serves the control socket
//! ([`control`]), each vCPU is a thread, and each active device is a worker thread. The guest is hostile: every register it
//! writes and every byte of its memory that is read is checked where it is used, and a bad guest ends its own VM only. Should
//! it take over the process all the same, it finds itself in a jail ([`jail`]).
//!
//! Not here: firmware, legacy devices but a serial port, ACPI hot-plug, migration.

#![deny(unsafe_code)]

mod acpi;
mod boot;
pub mod config;
pub mod control;
mod cpuid;
pub mod devices;
pub mod exit;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod io_bus;
mod irq;
pub mod jail;
pub mod kvm;
mod layout;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod serial;
pub mod sys;
pub mod tap;
mod vcpu;
pub mod virtio;
