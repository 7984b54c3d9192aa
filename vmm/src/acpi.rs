//! The ACPI tables, written once before the guest starts (ACPI 6.5): processors and I/O APIC (MADT), the PCI host bridge
//! (MCFG, DSDT), and registers to power off and to reset (FADT). Hardware-reduced: no PM block, no SCI, no 8259.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::layout;

const OEM: [u8; 6] = *b"ISOPOD";
const TABLE: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
const ALIGNMENT: usize = 64;

/// All tables for a VM with `vcpus` CPUs, as one run of bytes to be put at [`layout::ACPI_TABLES`], the RSDP first.
pub fn tables(vcpus: u8) -> Vec<u8> {
    let mut area = Area { bytes: vec![0; Rsdp::len().next_multiple_of(ALIGNMENT)] };
    let dsdt = area.place(&dsdt());
    let fadt = area.place(&fadt(dsdt));
    let madt = area.place(&madt(vcpus));
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    let mcfg = area.place(&mcfg);
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for entry in [fadt, madt, mcfg] {
        xsdt.add_entry(entry);
    }
    let xsdt = area.place(&xsdt);
    let rsdp = bytes_of(&Rsdp::new(OEM, xsdt));
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    assert!(area.bytes.len() as u64 <= layout::ACPI_TABLES_END - layout::ACPI_TABLES, "64 CPUs' tables take a few KiB");
    area.bytes
}

/// Tables one after the other in guest memory.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends `table` and returns its guest address.
    fn place(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI_TABLES + self.bytes.len() as u64;
        self.bytes.extend(bytes_of(table));
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn register(port: u16) -> GAS {
    GAS::new(RegisterSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .preferred_pm_profile(PmProfile::Unspecified);
    fadt.reset_reg = register(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = register(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = register(layout::SLEEP_STATUS_PORT);
    // No VGA, no CMOS clock, no 8042: what Linux would otherwise probe for (ACPI 6.5, 5.2.9.3).
    fadt.iapc_boot_arch = ((1 << 2) | (1 << 5)).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt() -> Sdt {
    let mut aml = Vec::new();
    host_bridge(&mut aml);
    serial_port(&mut aml);
    let s5 = Package::new(vec![&layout::SLEEP_TYPE_S5]);
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, TABLE, REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// The host bridge of bus 0 with its windows, and the motherboard device that claims the configuration space
/// (PCI firmware specification 3.3, 4.1.2).
fn host_bridge(sink: &mut dyn AmlSink) {
    let bus = AddressSpace::new_bus_number(0u16, 0);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW as u32,
        (layout::PCI_WINDOW_END - 1) as u32,
        None,
    );
    let ecam = Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32);
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("PCI0"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                    &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                    &Name::new(Path::new("_SEG"), &ZERO),
                    &Name::new(Path::new("_BBN"), &ZERO),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_CCA"), &ONE),
                    &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&bus, &window])),
                ],
            ),
            &Device::new(
                Path::new("MBRD"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ecam])),
                ],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn serial_port(sink: &mut dyn AmlSink) {
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports, &interrupt])),
            ],
        )],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at guest address `address`.
    fn table(area: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - layout::ACPI_TABLES).expect("in the area");
        let length = u32_at(area, start + 4) as usize;
        &area[start..start + length]
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_its_bytes_sum_to_zero() {
        for vcpus in [1, 2, 64] {
            let area = tables(vcpus);
            assert_eq!((&area[..8], sum(&area[..20]), sum(&area[..36])), (&b"RSD PTR "[..], 0, 0));
            let xsdt = table(&area, u64_at(&area, 24));
            let mut seen = vec![];
            let pointers: Vec<u64> = (36..xsdt.len()).step_by(8).map(|offset| u64_at(xsdt, offset)).collect();
            let dsdt = u64_at(table(&area, pointers[0]), 140);
            for address in [&[u64_at(&area, 24), dsdt], &pointers[..]].concat() {
                let table = table(&area, address);
                assert_eq!(sum(table), 0, "{:?}", &table[..4]);
                seen.push(table[..4].to_vec());
            }
            assert_eq!(seen, [b"XSDT", b"DSDT", b"FACP", b"APIC", b"MCFG"].map(|name| name.to_vec()));
        }
    }

    #[test]
    fn the_madt_names_every_vcpu() {
        let madt = bytes_of(&madt(3));
        let ids: Vec<_> = (0..3).map(|index| (madt[44 + index * 8], madt[44 + index * 8 + 3])).collect();
        assert_eq!(ids, [(0, 0), (0, 1), (0, 2)]);
    }
}
