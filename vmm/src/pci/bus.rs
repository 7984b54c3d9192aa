//! Bus 0: which functions there are, and who answers an access.
//!
//! Devices 1 to 15 have one function each. When they are taken, devices 16 to 31 take seven each: functions 1 to 7, beside a
//! function 0 that only holds the device's place, because Linux looks at the others only if there is one.

use std::collections::BTreeMap;

use isopod_proto::ErrorKind;

use super::{BAR_SIZE, ConfigWindow, PciFunction, Placeholder};
use crate::layout;

/// Bytes of configuration space of a function.
pub(super) const FUNCTION_BYTES: u64 = 4096;
/// Functions of a device.
pub(super) const FUNCTIONS: u8 = 8;
const SINGLE_DEVICES: std::ops::RangeInclusive<u8> = 1..=15;
const MULTI_DEVICES: std::ops::RangeInclusive<u8> = 16..=31;
/// Functions that can be added to the bus.
pub const CAPACITY: usize = 15 + 16 * 7;

/// A function of bus 0: its device number times 8, and its function number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FunctionNumber(u8);

impl FunctionNumber {
    const HOST_BRIDGE: Self = Self(0);

    fn new(device: u8, function: u8) -> Self {
        Self(device * FUNCTIONS + function)
    }

    fn first_of_device(self) -> Self {
        Self(self.0 / FUNCTIONS * FUNCTIONS)
    }

    /// Where a function's BAR is until the guest moves it: a place of its own for each.
    pub fn initial_bar(self) -> u32 {
        layout::PCI_WINDOW as u32 + u32::from(self.0) * BAR_SIZE as u32
    }
}

/// Why a function cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All function numbers are taken.
    #[error("all {CAPACITY} places on the PCI bus are taken")]
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

/// The functions of bus 0.
pub struct PciBus {
    functions: BTreeMap<FunctionNumber, Box<dyn PciFunction>>,
    window: Option<ConfigWindow>,
}

impl PciBus {
    /// A bus with only `host_bridge`, at 00.0.
    pub fn new(host_bridge: Box<dyn PciFunction>) -> Self {
        Self { functions: BTreeMap::from([(FunctionNumber::HOST_BRIDGE, host_bridge)]), window: None }
    }

    /// Keeps `window` as configuration space is from now on.
    pub fn show_in(&mut self, window: ConfigWindow) {
        self.window = Some(window);
        for number in self.functions.keys() {
            self.show(*number);
        }
    }

    fn show(&self, number: FunctionNumber) {
        if let Some(window) = &self.window {
            window.show(number.0, self.functions.get(&number).map(|function| &**function as &dyn PciFunction));
        }
    }

    /// A place with nothing in it.
    pub fn free_place(&self) -> Result<FunctionNumber, PciError> {
        let single = SINGLE_DEVICES.map(|device| FunctionNumber::new(device, 0));
        let multi =
            MULTI_DEVICES.flat_map(|device| (1..FUNCTIONS).map(move |function| FunctionNumber::new(device, function)));
        single.chain(multi).find(|number| !self.functions.contains_key(number)).ok_or(PciError::Full)
    }

    /// Puts `function` at `number`, where the guest finds it when it next scans the bus.
    pub fn insert(&mut self, number: FunctionNumber, function: Box<dyn PciFunction>) {
        let first = number.first_of_device();
        self.functions.insert(number, function);
        if first == number || self.functions.contains_key(&first) {
            return self.show(number);
        }
        self.functions.insert(first, Box::new(Placeholder::new()));
        // The guest looks at all of them from now on; at function 0 first.
        for function in (0..FUNCTIONS).rev() {
            self.show(FunctionNumber(first.0 + function));
        }
    }

    /// Takes the function at `number` away: from then on the guest reads ones there.
    pub fn remove(&mut self, number: FunctionNumber) -> Option<Box<dyn PciFunction>> {
        let function = self.functions.remove(&number);
        self.show(number);
        function
    }

    /// Takes all functions away.
    pub fn clear(&mut self) {
        self.window = None;
        self.functions.clear();
    }

    /// Reads guest-physical `address` in the PCI window or in configuration space. What nobody answers reads as ones.
    pub fn read(&mut self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((number, offset)) = config_place(address, data.len()) {
            if let Some(function) = self.functions.get(&number) {
                function.read_config(offset, data);
            }
        } else if let Some((function, offset)) = self.memory_target(address) {
            function.read_memory(offset, data);
        }
    }

    /// Writes guest-physical `address`. What nobody answers is ignored.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        if let Some((number, offset)) = config_place(address, data.len()) {
            if let Some(function) = self.functions.get_mut(&number) {
                function.write_config(offset, data);
                self.show(number);
            }
        } else if let Some((function, offset)) = self.memory_target(address) {
            function.write_memory(offset, data);
        }
    }

    fn memory_target(&mut self, address: u64) -> Option<(&mut Box<dyn PciFunction>, u64)> {
        self.functions.values_mut().find_map(|function| {
            let offset = address.checked_sub(function.memory_bar()?)?;
            (offset < BAR_SIZE).then_some((function, offset))
        })
    }
}

/// The function and the offset in it of a configuration access (PCI Express base specification, 7.2.2); it must not cross a
/// register.
fn config_place(address: u64, length: usize) -> Option<(FunctionNumber, u16)> {
    let place = address.checked_sub(layout::ECAM).filter(|place| *place < layout::ECAM_SIZE)?;
    let (number, offset) = (place / FUNCTION_BYTES, place % FUNCTION_BYTES);
    (offset % 4 + length as u64 <= 4).then_some((FunctionNumber(number as u8), offset as u16))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestAddress};

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
    fn places_run_out_and_come_back() {
        let mut bus = PciBus::new(Box::new(HostBridge::new()));
        let mut bars = std::collections::BTreeSet::new();
        for _ in 0..CAPACITY {
            let place = bus.free_place().expect("a free place");
            assert!(bars.insert(place.initial_bar()));
            bus.insert(place, Box::new(HostBridge::new()));
        }
        assert!(
            u64::from(bars.last().expect("many") - bars.first().expect("many"))
                < layout::PCI_WINDOW_END - layout::PCI_WINDOW
        );
        assert!(matches!(bus.free_place(), Err(PciError::Full)));
        for number in [FunctionNumber::new(7, 0), FunctionNumber::new(20, 3)] {
            assert!(bus.remove(number).is_some());
            assert_eq!(bus.free_place().expect("freed"), number);
            bus.insert(number, Box::new(HostBridge::new()));
        }
    }

    #[test]
    fn the_window_shows_what_a_read_gives() {
        let mut bus = PciBus::new(Box::new(HostBridge::new()));
        let window = ConfigWindow::new().expect("mapped");
        let memory = window.memory().clone();
        bus.show_in(window);
        let functions = |device: u64| (device * 8..device * 8 + 8).map(|number| layout::ECAM + number * FUNCTION_BYTES);
        let same = |bus: &mut PciBus, addresses: Vec<u64>| {
            for address in addresses.into_iter().flat_map(|place| (0..256).step_by(4).map(move |offset| place + offset))
            {
                let mut shown = [0; 4];
                memory.read_slice(&mut shown, GuestAddress(address)).expect("in the window");
                assert_eq!(shown.as_slice(), read(bus, address, 4), "{address:#x}");
            }
        };
        same(&mut bus, vec![layout::ECAM]);
        let (single, multi) = (FunctionNumber::new(3, 0), FunctionNumber::new(20, 3));
        for number in [single, multi] {
            bus.insert(number, Box::new(HostBridge::new()));
        }
        let all: Vec<u64> = functions(20).chain([layout::ECAM + u64::from(single.0) * FUNCTION_BYTES]).collect();
        same(&mut bus, all.clone());
        bus.write(layout::ECAM + u64::from(multi.0) * FUNCTION_BYTES + 4, &[7, 0]);
        assert_eq!(read(&mut bus, layout::ECAM + u64::from(multi.0) * FUNCTION_BYTES + 4, 1), [6]);
        same(&mut bus, all.clone());
        for number in [single, multi] {
            bus.remove(number);
        }
        same(&mut bus, all);
    }

    #[test]
    fn a_device_with_several_functions_says_so_in_function_0_even_when_the_others_are_gone() {
        let mut bus = PciBus::new(Box::new(HostBridge::new()));
        let number = FunctionNumber::new(16, 2);
        bus.insert(number, Box::new(HostBridge::new()));
        let config = |function: u64| layout::ECAM + (16 * 8 + function) * FUNCTION_BYTES;
        for _ in 0..2 {
            assert_eq!(read(&mut bus, config(0) + 0xe, 1), [0x80]);
            assert_eq!(read(&mut bus, config(1), 4), [0xff; 4]);
            bus.remove(number);
        }
        assert_eq!(read(&mut bus, config(2), 4), [0xff; 4]);
    }
}
