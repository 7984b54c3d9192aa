//! Configuration space as the guest reads it: memory that KVM shows it read-only, so that a read costs no exit. Linux reads some
//! hundred registers of each function while it boots and when a disk is plugged in. A write still exits, and what it changes is
//! copied here.

use vm_memory::mmap::FromRangesError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::PciFunction;
use super::bus::{FUNCTION_BYTES, FUNCTIONS};
use super::config_space::CONFIG_BYTES;
use crate::layout;
use crate::virtio::GuestMemory;

const REGISTER: usize = 4;

/// Configuration space of bus 0.
pub struct ConfigWindow(GuestMemory);

impl ConfigWindow {
    /// A bus without functions: every function 0 reads as ones, which tells that there is none. The others of a device, which
    /// nobody looks at if there is no function 0, read as zeroes, and take no page of the host's.
    pub fn new() -> Result<Self, FromRangesError> {
        let place = (GuestAddress(layout::ECAM), layout::ECAM_SIZE as usize);
        let window = Self(GuestMemoryMmap::from_ranges(&[place])?);
        for number in (0..=u8::MAX).step_by(FUNCTIONS.into()) {
            window.write(number, 0, &[0xff; REGISTER]);
        }
        Ok(window)
    }

    /// The memory, at the guest's addresses.
    pub fn memory(&self) -> &GuestMemory {
        &self.0
    }

    /// Shows all registers of the function at `number`; without one, ones.
    pub fn show(&self, number: u8, function: Option<&dyn PciFunction>) {
        let mut bytes = [0xff; CONFIG_BYTES];
        if let Some(function) = function {
            for (index, register) in bytes.chunks_exact_mut(REGISTER).enumerate() {
                function.read_config((index * REGISTER) as u16, register);
            }
        }
        // A guest that looks meanwhile finds the function, by its first register, when all of it is there.
        let (first, rest) = bytes.split_at(REGISTER);
        self.write(number, REGISTER as u64, rest);
        self.write(number, 0, first);
    }

    fn write(&self, number: u8, offset: u64, bytes: &[u8]) {
        let address = GuestAddress(layout::ECAM + u64::from(number) * FUNCTION_BYTES + offset);
        self.0.write_slice(bytes, address).expect("the window holds 256 functions of 4 KiB");
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostBridge;
    use super::*;

    fn register(window: &ConfigWindow, number: u64, offset: u64) -> u32 {
        window.memory().read_obj(GuestAddress(layout::ECAM + number * FUNCTION_BYTES + offset)).expect("in the window")
    }

    #[test]
    fn a_function_is_shown_and_hidden() {
        let window = ConfigWindow::new().expect("mapped");
        assert_eq!([0, 8, 248].map(|number| register(&window, number, 0)), [u32::MAX; 3]);
        assert_eq!(register(&window, 9, 0), 0, "no page is taken for it");
        let mut bridge = HostBridge::new();
        window.show(8, Some(&bridge));
        assert_eq!((register(&window, 8, 0), register(&window, 8, 8) >> 16), (0x0008_1b36, 0x0600));
        bridge.write_config(4, &2u16.to_le_bytes());
        window.show(8, Some(&bridge));
        assert_eq!(register(&window, 8, 4) & 2, 2);
        window.show(8, None);
        assert_eq!([0, 4, 252].map(|offset| register(&window, 8, offset)), [u32::MAX; 3]);
    }
}
