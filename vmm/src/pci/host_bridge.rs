//! Functions without registers of their own: the host bridge at 00:00.0, which drivers expect, and placeholders.

use super::PciFunction;
use super::config_space::{ConfigSpace, Identity};

/// Red Hat's generic PCIe host bridge, for which Linux has no quirk.
const IDENTITY: Identity = Identity { vendor: 0x1b36, device: 0x0008, subsystem: 0, revision: 0, class: 0x06_0000 };

/// Function 0 of a device that has several; of a class that has no driver.
const PLACEHOLDER: Identity = Identity { vendor: 0x1b36, device: 0x0005, subsystem: 0, revision: 0, class: 0xff_0000 };

/// The host bridge.
pub struct HostBridge {
    config: ConfigSpace,
}

/// Function 0 of a device whose other functions are used.
pub struct Placeholder {
    config: ConfigSpace,
}

impl Placeholder {
    /// A placeholder.
    pub fn new() -> Self {
        let mut config = ConfigSpace::new(&PLACEHOLDER);
        config.set_multifunction();
        Self { config }
    }
}

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        Self { config: ConfigSpace::new(&IDENTITY) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

/// Implements a function that has nothing but its configuration space.
macro_rules! only_configuration {
    ($function:ty) => {
        impl PciFunction for $function {
            fn read_config(&self, offset: u16, data: &mut [u8]) {
                self.config.read(offset, data);
            }

            fn write_config(&mut self, offset: u16, data: &[u8]) {
                self.config.write(offset, data);
            }

            fn memory_bar(&self) -> Option<u64> {
                None
            }

            fn read_memory(&mut self, _offset: u64, data: &mut [u8]) {
                data.fill(0);
            }

            fn write_memory(&mut self, _offset: u64, _data: &[u8]) {}
        }
    };
}

only_configuration!(HostBridge);
only_configuration!(Placeholder);
