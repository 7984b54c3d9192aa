//! Bus 0: which functions there are, and who answers an access.

use isopod_proto::ErrorKind;

use super::{BAR_SIZE, PciFunction};
use crate::layout;

/// Devices on a bus.
const SLOTS: usize = 32;
const FUNCTION_BYTES: u64 = 4096;
const FUNCTIONS_PER_SLOT: u64 = 8;

/// A device number on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotNumber(u8);

impl SlotNumber {
    /// Where a function's BAR is until the guest moves it: a place of its own for each slot.
    pub fn initial_bar(self) -> u32 {
        layout::PCI_WINDOW as u32 + u32::from(self.0) * BAR_SIZE as u32
    }
}

/// Why a function cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All device numbers are taken.
    #[error("all {} device slots of the PCI bus are taken", SLOTS - 1)]
    Full,
}

impl PciError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Full => ErrorKind::ResourceExhausted,
        }
    }
}

/// The functions of bus 0, each function 0 of its device.
pub struct PciBus {
    slots: [Option<Box<dyn PciFunction>>; SLOTS],
}

impl PciBus {
    /// A bus with only `host_bridge`, in slot 0.
    pub fn new(host_bridge: Box<dyn PciFunction>) -> Self {
        let mut slots = [const { None }; SLOTS];
        slots[0] = Some(host_bridge);
        Self { slots }
    }

    /// A slot with nothing in it.
    pub fn free_slot(&self) -> Result<SlotNumber, PciError> {
        let slot = self.slots.iter().position(Option::is_none).ok_or(PciError::Full)?;
        Ok(SlotNumber(slot as u8))
    }

    /// Puts `function` into `slot`, where the guest finds it when it next scans the bus.
    pub fn insert(&mut self, slot: SlotNumber, function: Box<dyn PciFunction>) {
        self.slots[usize::from(slot.0)] = Some(function);
    }

    /// Takes the function out of `slot`: from then on the guest reads ones there.
    pub fn remove(&mut self, slot: SlotNumber) -> Option<Box<dyn PciFunction>> {
        self.slots[usize::from(slot.0)].take()
    }

    /// Takes all functions out.
    pub fn clear(&mut self) {
        self.slots.fill_with(|| None);
    }

    /// Reads guest-physical `address` in the PCI window or in configuration space. What nobody answers reads as ones.
    pub fn read(&mut self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((function, offset)) = self.config_target(address, data.len()) {
            function.read_config(offset, data);
        } else if let Some((function, offset)) = self.memory_target(address) {
            function.read_memory(offset, data);
        }
    }

    /// Writes guest-physical `address`. What nobody answers is ignored.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        if let Some((function, offset)) = self.config_target(address, data.len()) {
            function.write_config(offset, data);
        } else if let Some((function, offset)) = self.memory_target(address) {
            function.write_memory(offset, data);
        }
    }

    /// Who answers a configuration access (PCI Express base specification, 7.2.2); it must not cross a register.
    fn config_target(&mut self, address: u64, length: usize) -> Option<(&mut Box<dyn PciFunction>, u16)> {
        let place = address.checked_sub(layout::ECAM).filter(|place| *place < layout::ECAM_SIZE)?;
        let (number, offset) = (place / FUNCTION_BYTES, place % FUNCTION_BYTES);
        if number % FUNCTIONS_PER_SLOT != 0 || offset % 4 + length as u64 > 4 {
            return None;
        }
        let function = self.slots[(number / FUNCTIONS_PER_SLOT) as usize].as_mut()?;
        Some((function, offset as u16))
    }

    fn memory_target(&mut self, address: u64) -> Option<(&mut Box<dyn PciFunction>, u64)> {
        self.slots.iter_mut().flatten().find_map(|function| {
            let offset = address.checked_sub(function.memory_bar()?)?;
            (offset < BAR_SIZE).then_some((function, offset))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostBridge;
    use super::*;

    fn read(bus: &mut PciBus, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        bus.read(address, &mut data);
        data
    }

    #[test]
    fn the_host_bridge_answers_at_its_address_only() {
        let mut bus = PciBus::new(Box::new(HostBridge::new()));
        assert_eq!(read(&mut bus, layout::ECAM, 4), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(read(&mut bus, layout::ECAM + 2, 2), [0x08, 0x00]);
        for absent in [1 << 12, 1 << 15, 31 << 15] {
            assert_eq!(read(&mut bus, layout::ECAM + absent, 4), [0xff; 4], "{absent:#x}");
        }
    }

    #[test]
    fn accesses_that_are_no_register_read_ones_and_change_nothing() {
        let mut bus = PciBus::new(Box::new(HostBridge::new()));
        for (address, length) in [(layout::ECAM + 2, 4), (layout::ECAM, 8), (layout::ECAM + 0xfffff, 4), (u64::MAX, 1)]
        {
            assert_eq!(read(&mut bus, address, length), vec![0xff; length], "{address:#x}");
            bus.write(address, &vec![0; length]);
        }
        assert_eq!(read(&mut bus, layout::ECAM, 4), [0x36, 0x1b, 0x08, 0x00]);
    }

    #[test]
    fn slots_run_out_and_come_back() {
        let mut bus = PciBus::new(Box::new(HostBridge::new()));
        let mut bars = std::collections::BTreeSet::new();
        for _ in 1..SLOTS {
            let slot = bus.free_slot().expect("a free slot");
            assert!(bars.insert(slot.initial_bar()));
            bus.insert(slot, Box::new(HostBridge::new()));
        }
        assert!(matches!(bus.free_slot(), Err(PciError::Full)));
        assert!(bus.remove(SlotNumber(7)).is_some());
        assert_eq!(bus.free_slot().expect("freed"), SlotNumber(7));
    }
}
