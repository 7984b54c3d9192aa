//! Where things are in the guest's physical address space and on its I/O ports.
//!
//! ```text
//! 0            .. 0x9_fc00      RAM: boot parameters, page tables, command line
//! 0xe_0000     .. 0x10_0000     ACPI tables
//! 0x10_0000    .. 0xc000_0000   RAM: kernel, initramfs at the end
//! 0xc000_0000  .. 0xe000_0000   PCI memory window (BARs)
//! 0xe000_0000  .. 0xe010_0000   PCI configuration space of bus 0 (ECAM)
//! 0xfec0_0000, 0xfee0_0000      I/O APIC, local APICs (in KVM)
//! 0x1_0000_0000 ..              the rest of RAM
//! ```

/// Global descriptor table the boot CPU starts with.
pub const BOOT_GDT: u64 = 0x500;
/// The zero page (Linux `Documentation/arch/x86/zero-page.rst`).
pub const BOOT_PARAMS: u64 = 0x7000;
/// Top of the boot CPU's first stack.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Identity-mapping page tables of the boot CPU: one page each.
pub const BOOT_PML4: u64 = 0x9000;
/// See [`BOOT_PML4`].
pub const BOOT_PDPT: u64 = 0xa000;
/// See [`BOOT_PML4`].
pub const BOOT_PD: u64 = 0xb000;
/// The kernel's command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Most bytes of command line, NUL included (x86's COMMAND_LINE_SIZE).
pub const CMDLINE_MAX: usize = 2048;
/// End of the RAM below the legacy hole.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables, the RSDP first: in the area where it may be searched for.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// Where RAM goes on; kernels are linked above it.
pub const HIGH_RAM: u64 = 0x10_0000;

/// RAM below 4 GiB ends here at the latest; the PCI window starts here.
pub const PCI_WINDOW: u64 = 0xc000_0000;
/// End of the PCI window.
pub const PCI_WINDOW_END: u64 = 0xe000_0000;
/// Configuration space of bus 0 by memory access (PCI Express base specification, 7.2.2).
pub const ECAM: u64 = 0xe000_0000;
/// 256 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that KVM wants for itself on Intel hosts.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM wants for itself on Intel hosts.
pub const KVM_TSS: usize = 0xfffb_d000;
/// Where RAM that does not fit below the PCI window goes on.
pub const RAM_ABOVE_4G: u64 = 1 << 32;

/// First port of the serial console.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// ACPI's sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI's sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI's reset register (ACPI 6.5, 4.8.3.6).
pub const RESET_PORT: u16 = 0x602;
/// What is written to [`RESET_PORT`] to reset.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of S5 in `\_S5`.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Interrupt lines of the I/O APIC; message-signalled interrupts have numbers from here on.
pub const IO_APIC_PINS: u32 = 24;
