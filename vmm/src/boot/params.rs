//! The zero page, the memory map in it, and the command line.

use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::BootError;
use crate::layout;
use crate::virtio::GuestMemory;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A boot loader without an assigned number.
const UNDEFINED_LOADER: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The kernel arguments a VM needs, before `extra`.
///
/// A reset is a triple fault, which ends `KVM_RUN` at once, and a panic resets. Only bus 0 exists. No loop or dummy devices
/// are made before somebody asks for one: eight and one of them would be, at every boot. Only errors reach the console
/// unless `verbose`: each byte costs two exits. Of the processors that there are `vcpus` are brought up; the agent brings up further ones.
/// Memory that comes later is kept for what can be moved, as far as the kernel has enough besides, so that it can go again.
pub fn command_line(verbose: bool, vcpus: u8, extra: &str) -> String {
    let console = if verbose { "console=ttyS0 ignore_loglevel" } else { "console=ttyS0 quiet" };
    let mut line = format!(
        "{console} reboot=t panic=-1 no_timer_check pci=lastbus=0 loop.max_loop=0 dummy.numdummies=0 maxcpus={vcpus} \
         memory_hotplug.online_policy=auto-movable"
    );
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line
}

/// Writes the zero page and the command line.
pub(super) fn write(memory: &GuestMemory, cmdline: &str, initramfs: &Range<u64>) -> Result<(), BootError> {
    let length = cmdline.len();
    if length >= layout::CMDLINE_MAX || cmdline.contains('\0') {
        return Err(BootError::CommandLine { length, limit: layout::CMDLINE_MAX - 1 });
    }
    let mut params = boot_params { acpi_rsdp_addr: layout::ACPI_TABLES, ..Default::default() };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = length as u32;
    params.hdr.ramdisk_image = u32::try_from(initramfs.start).expect("the initramfs is below 4 GiB");
    params.hdr.ramdisk_size = u32::try_from(initramfs.end - initramfs.start).expect("it is below 4 GiB as a whole");
    let map = memory_map(memory);
    params.e820_entries = u8::try_from(map.len()).expect("the map has six entries at most");
    params.e820_table[..map.len()].copy_from_slice(&map);

    memory.write_obj(params, GuestAddress(layout::BOOT_PARAMS)).map_err(BootError::Write)?;
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE)).map_err(BootError::Write)?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + length as u64)).map_err(BootError::Write)
}

/// The E820 map: RAM, and what must not be taken for it.
fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry { addr: start, size: end - start, r#type: kind };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, E820_RAM),
        entry(layout::ACPI_TABLES, layout::ACPI_TABLES_END, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0;
        map.push(entry(start.max(layout::HIGH_RAM), start + region.len(), E820_RAM));
    }
    map.push(entry(layout::ECAM, layout::ECAM + layout::ECAM_SIZE, E820_RESERVED));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_memory_map_covers_all_ram_once_and_not_the_holes() {
        let memory = memory::allocate((3 << 30) + (1 << 30)).expect("address space");
        let mut map: Vec<_> = memory_map(&memory).iter().map(|e| (e.addr, e.addr + e.size, e.r#type)).collect();
        map.sort_unstable();
        for pair in map.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:x?} overlap");
        }
        let ram: Vec<_> = map.iter().filter(|entry| entry.2 == E820_RAM).map(|&(start, end, _)| (start, end)).collect();
        assert_eq!(ram, [(0, 0x9_fc00), (0x10_0000, 3 << 30), (1 << 32, (1 << 32) + (1 << 30))]);
    }

    #[test]
    fn the_zero_page_names_command_line_and_initramfs() {
        let memory = memory::allocate(64 << 20).expect("memory");
        write(&memory, "quiet", &(0x200_0000..0x200_1234)).expect("it fits");
        let params: boot_params = memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).expect("in memory");
        let header = params.hdr;
        assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (0x200_0000, 0x1234));
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_TABLES);
        let mut line = [0xff; 6];
        memory.read_slice(&mut line, GuestAddress(u64::from(header.cmd_line_ptr))).expect("in memory");
        assert_eq!(&line, b"quiet\0");
    }

    #[test]
    fn a_command_line_that_linux_would_cut_is_refused() {
        let memory = memory::allocate(64 << 20).expect("memory");
        for line in ["x".repeat(layout::CMDLINE_MAX), "a\0b".into()] {
            assert!(matches!(write(&memory, &line, &(0..1)), Err(BootError::CommandLine { .. })));
        }
        assert!(write(&memory, &"x".repeat(layout::CMDLINE_MAX - 1), &(0..1)).is_ok());
    }

    #[test]
    fn own_arguments_come_before_the_daemons() {
        let line = command_line(false, 2, "isopod.x=1");
        assert!(line.starts_with("console=") && line.ends_with(" isopod.x=1"), "{line}");
        assert!(line.contains(" maxcpus=2 "), "{line}");
        assert!(command_line(true, 1, "").contains("ignore_loglevel"));
    }
}
