//! The boot CPU's registers at the kernel's 64-bit entry point: long mode, the first GiB mapped one to one, flat segments,
//! interrupts off, `RSI` at the zero page.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::virtio::GuestMemory;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_ALWAYS_ONE: u64 = 1 << 1;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_HUGE: u64 = 1 << 7;

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, and everything they do not name is write-back memory.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// Why a CPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuStateError {
    /// KVM refuses registers.
    #[error("KVM refuses {0}")]
    Registers(&'static str, #[source] io::Error),
    /// KVM takes only some of the MSRs.
    #[error("KVM refuses MSR {0:#x}")]
    Msr(u32),
    /// Guest memory refuses the page tables or the descriptor table.
    #[error("cannot write the boot CPU's tables")]
    Tables(#[source] vm_memory::GuestMemoryError),
}

/// Sets the MSRs that every CPU has from its firmware.
pub fn set_up_msrs(vcpu: &VcpuFd) -> Result<(), CpuStateError> {
    let entries = [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).expect("two entries are not too many");
    let set = vcpu.set_msrs(&msrs).map_err(|error| CpuStateError::Registers("the MSRs", error.into()))?;
    entries.get(set).map_or(Ok(()), |refused| Err(CpuStateError::Msr(refused.index)))
}

/// Writes the boot CPU's tables into `memory` and points its registers at them and at `entry`.
pub fn set_up_boot_cpu(vcpu: &VcpuFd, memory: &GuestMemory, entry: GuestAddress) -> Result<(), CpuStateError> {
    let code = segment(0x10, 0xb, true);
    let data = segment(0x18, 0x3, false);
    let task = kvm_segment { s: 0, g: 0, db: 0, limit: 0x67, ..segment(0x20, 0xb, false) };
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    write_tables(memory, &gdt).map_err(CpuStateError::Tables)?;

    let refused = |what| move |error: kvm_ioctls::Error| CpuStateError::Registers(what, error.into());
    let mut special = vcpu.get_sregs().map_err(refused("reading the special registers"))?;
    special.gdt.base = layout::BOOT_GDT;
    special.gdt.limit = size_of_val(&gdt) as u16 - 1;
    special.idt.base = 0;
    special.idt.limit = 0;
    special.cs = code;
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = task;
    special.cr0 = CR0_PE | CR0_ET | CR0_PG;
    special.cr3 = layout::BOOT_PML4;
    special.cr4 = CR4_PAE;
    special.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&special).map_err(refused("the special registers"))?;

    let general = kvm_regs {
        rip: entry.0,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::BOOT_PARAMS,
        rflags: RFLAGS_ALWAYS_ONE,
        ..Default::default()
    };
    vcpu.set_regs(&general).map_err(refused("the general registers"))
}

/// A flat 4 GiB segment; `long` for 64-bit code.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xf_ffff_u32 << 12 | 0xfff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The segment as a descriptor in memory (Intel SDM volume 3A, 3.4.5); its base is zero.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags =
        u64::from(segment.avl) | u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16) << 48 | flags << 52
}

fn write_tables(memory: &GuestMemory, gdt: &[u64]) -> Result<(), vm_memory::GuestMemoryError> {
    for (address, entry) in (layout::BOOT_GDT..).step_by(8).zip(gdt) {
        memory.write_obj(*entry, GuestAddress(address))?;
    }
    memory.write_obj(layout::BOOT_PDPT | PAGE_PRESENT_WRITABLE, GuestAddress(layout::BOOT_PML4))?;
    memory.write_obj(layout::BOOT_PD | PAGE_PRESENT_WRITABLE, GuestAddress(layout::BOOT_PDPT))?;
    for index in 0..512 {
        let entry = (index << 21) | PAGE_HUGE | PAGE_PRESENT_WRITABLE;
        memory.write_obj(entry, GuestAddress(layout::BOOT_PD + index * 8))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_flat_ones() {
        assert_eq!(descriptor(&segment(0x10, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0x18, 0x3, false)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn page_tables_map_the_first_gib_one_to_one() {
        let memory = crate::memory::allocate(64 << 20).expect("memory");
        write_tables(&memory, &[]).expect("in memory");
        let read = |address| memory.read_obj::<u64>(GuestAddress(address)).expect("in memory");
        assert_eq!(read(layout::BOOT_PML4), layout::BOOT_PDPT | 3);
        assert_eq!(read(layout::BOOT_PDPT), layout::BOOT_PD | 3);
        assert_eq!(read(layout::BOOT_PD + 511 * 8), (511 << 21) | 0x83);
    }
}
