//! Which emulated register an exit of a vCPU is for.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::exit::{Exit, Reason};
use crate::layout;
use crate::pci::PciBus;
use crate::serial::SerialConsole;

const SERIAL_LAST: u16 = layout::SERIAL_PORT + 7;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// The emulated I/O ports and memory-mapped registers. vCPUs share it; an access holds one device's lock.
pub struct IoBus {
    serial: Mutex<SerialConsole>,
    pci: Arc<Mutex<PciBus>>,
}

impl IoBus {
    /// The machine's registers.
    pub fn new(serial: SerialConsole, pci: Arc<Mutex<PciBus>>) -> Self {
        Self { serial: Mutex::new(serial), pci }
    }

    /// Reads from an I/O port; one that is not there gives ones. A string instruction reads the port again for each byte.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        match port {
            layout::SERIAL_PORT..=SERIAL_LAST => {
                let mut serial = self.serial.lock();
                data.fill_with(|| serial.read((port - layout::SERIAL_PORT) as u8));
            }
            layout::SLEEP_CONTROL_PORT | layout::SLEEP_STATUS_PORT | layout::RESET_PORT => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// Writes to an I/O port. An end of the VM, if that is what the write asks for.
    pub fn port_out(&self, port: u16, data: &[u8]) -> Option<Exit> {
        match port {
            layout::SERIAL_PORT..=SERIAL_LAST => {
                let mut serial = self.serial.lock();
                for byte in data {
                    serial.write((port - layout::SERIAL_PORT) as u8, *byte);
                }
                None
            }
            layout::SLEEP_CONTROL_PORT => {
                let value = *data.first()?;
                let off =
                    value & SLEEP_ENABLE != 0 && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == layout::SLEEP_TYPE_S5;
                off.then(|| Exit::new(Reason::GuestPowerOff, "the guest powered itself off"))
            }
            layout::RESET_PORT => (data.first() == Some(&layout::RESET_VALUE))
                .then(|| Exit::new(Reason::GuestCrash, "the guest reset itself")),
            _ => None,
        }
    }

    /// Reads a memory-mapped register.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        self.pci.lock().read(address, data);
    }

    /// Writes a memory-mapped register.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        self.pci.lock().write(address, data);
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::pci::HostBridge;
    use crate::serial::{ConsoleRing, SerialInterrupt};

    fn bus() -> (IoBus, ConsoleRing) {
        let ring = ConsoleRing::default();
        let serial = SerialConsole::new(SerialInterrupt(EventFd::new(0).expect("eventfd")), ring.clone());
        let pci = Arc::new(Mutex::new(PciBus::new(Box::new(HostBridge::new()))));
        (IoBus::new(serial, pci), ring)
    }

    #[test]
    fn a_string_instruction_prints_all_its_bytes() {
        let (bus, ring) = bus();
        assert_eq!(bus.port_out(layout::SERIAL_PORT, b"hello"), None);
        assert_eq!(ring.contents(), b"hello");
    }

    #[test]
    fn only_sleep_type_s5_with_the_enable_bit_powers_off() {
        let (bus, _) = bus();
        for value in 0..=u8::MAX {
            let exit = bus.port_out(layout::SLEEP_CONTROL_PORT, &[value]);
            let expected = value & 0x3c == (5 << 2) | 0x20;
            assert_eq!(exit.is_some_and(|exit| exit.reason == Reason::GuestPowerOff), expected, "{value:#x}");
        }
    }

    #[test]
    fn a_write_to_the_reset_register_is_a_crash() {
        let (bus, _) = bus();
        assert_eq!(bus.port_out(layout::RESET_PORT, &[0]), None);
        assert_eq!(bus.port_out(layout::RESET_PORT, &[1]).expect("an end").reason, Reason::GuestCrash);
    }

    #[test]
    fn ports_that_are_not_there_read_as_ones() {
        let (bus, _) = bus();
        for port in [0, 0x60, 0xcf8, 0xcfc, 0x3f7, 0x400, u16::MAX] {
            let mut data = [0; 4];
            bus.port_in(port, &mut data);
            assert_eq!((data, bus.port_out(port, &[0xff])), ([0xff; 4], None), "{port:#x}");
        }
    }
}
