//! The 256 bytes of a type 0 configuration header with its capabilities (PCI local bus specification 3.0, chapter 6).

/// Bytes of configuration space that exist; what is above, up to 4096, reads as zero.
pub const CONFIG_BYTES: usize = 256;
/// Offset of the command register.
pub const COMMAND: u16 = 0x04;
/// Command: decode memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: bus master, and no INTx; kept for the driver but without effect.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | (1 << 2) | (1 << 10);
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const HEADER_TYPE: usize = 0x0e;
const HEADER_MULTIFUNCTION: u8 = 1 << 7;
/// Offset of the first base address register.
pub const BAR0: u16 = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// What a function is.
pub struct Identity {
    /// Vendor id; also of the subsystem.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Revision id.
    pub revision: u8,
    /// Class, subclass and programming interface: the low 24 bits.
    pub class: u32,
}

/// Bytes, and which of their bits the guest may change.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    last_capability: Option<usize>,
    end: usize,
}

impl ConfigSpace {
    /// A header without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            last_capability: None,
            end: FIRST_CAPABILITY,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x09, &identity.class.to_le_bytes()[..3]);
        space.set(0x2c, &identity.vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND.into(), &COMMAND_WRITABLE.to_le_bytes());
        space
    }

    /// Tells that the device has functions beside this one, its function 0.
    pub fn set_multifunction(&mut self) {
        self.set(HEADER_TYPE, &[HEADER_MULTIFUNCTION]);
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size` bytes, a power of two, at `address`. Writing ones to it then reads back as
    /// its size, as the specification asks.
    pub fn set_memory_bar(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && address.is_multiple_of(size));
        self.set(BAR0.into(), &address.to_le_bytes());
        self.allow(BAR0.into(), &(!(size - 1)).to_le_bytes());
    }

    /// Appends a capability with its id and `body`, and returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        let offset = self.end.next_multiple_of(4);
        let pointer = self.last_capability.map_or(CAPABILITY_POINTER, |last| last + 1);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.bytes[pointer] = u8::try_from(offset).expect("capabilities fit into 256 bytes");
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_capability = Some(offset);
        self.end = offset + 2 + body.len();
        offset as u16
    }

    /// Lets the guest change the bits in `mask` at `offset`.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    fn set(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// Reads; bytes that do not exist are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, position) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(position).copied().unwrap_or(0);
        }
    }

    /// Changes the writable bits.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (byte, position) in data.iter().zip(usize::from(offset)..) {
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(position), self.writable.get(position)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
    }

    /// The 16-bit register at `offset`.
    pub fn u16(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Where BAR 0 is, if the command register lets it be decoded.
    pub fn memory_bar(&self) -> Option<u64> {
        let mut bytes = [0; 4];
        self.read(BAR0, &mut bytes);
        let address = u32::from_le_bytes(bytes);
        (self.u16(COMMAND) & COMMAND_MEMORY != 0 && address != 0).then_some(u64::from(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Identity { vendor: 0x1af4, device: 0x1042, subsystem: 0x40, revision: 1, class: 0x01_8000 })
    }

    fn u32_at(space: &ConfigSpace, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_header_is_where_the_specification_puts_it() {
        let space = space();
        assert_eq!(u32_at(&space, 0), 0x1042_1af4);
        assert_eq!(u32_at(&space, 8), 0x0180_0001);
        assert_eq!(u32_at(&space, 0x2c), 0x0040_1af4);
    }

    #[test]
    fn read_only_registers_stay_when_written() {
        let mut space = space();
        for offset in (0..256).step_by(4).filter(|offset| *offset != 4) {
            let before = u32_at(&space, offset);
            space.write(offset, &[0xff; 4]);
            assert_eq!(u32_at(&space, offset), before, "{offset:#x}");
        }
    }

    #[test]
    fn writing_ones_to_a_bar_shows_its_size_and_it_decodes_only_when_told_to() {
        let mut space = space();
        space.set_memory_bar(0xc000_8000, 0x8000);
        assert_eq!(space.memory_bar(), None);
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.memory_bar(), Some(0xc000_8000));
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(u32_at(&space, BAR0), 0xffff_8000);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0; 10]);
        let second = space.add_capability(0x09, &[0; 14]);
        assert_eq!(u32_at(&space, 0x34) as u16, first);
        assert_eq!(u32_at(&space, first) & 0xffff, u32::from(second) << 8 | 0x11);
        assert_eq!(u32_at(&space, second) & 0xffff, 0x09);
        assert_eq!(u32_at(&space, 4) >> 20 & 1, 1);
    }

    #[test]
    fn what_does_not_exist_reads_as_zero_and_is_not_written() {
        let mut space = space();
        space.write(254, &[0xff; 4]);
        space.write(4092, &[0xff; 4]);
        assert_eq!((u32_at(&space, 254), u32_at(&space, 4092)), (0, 0));
    }
}
