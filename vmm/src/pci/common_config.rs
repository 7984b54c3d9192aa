//! The common configuration structure (virtio 1.2, 4.1.4.3) and the device status state machine in it (2.1, 3.1).
//!
//! ```text
//! reset (0) -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK
//!     ^                                                    |
//!     +---- status written 0, from anywhere ---------------+      any -> NEEDS_RESET by the device
//! ```
//!
//! Pure: it holds what the driver wrote and says what is to be done; the transport does it.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::virtio::GuestMemory;

/// The driver knows how to drive the device, and has features agreed on.
pub const STATUS_FEATURES_OK: u8 = 8;
/// The driver is set up.
pub const STATUS_DRIVER_OK: u8 = 4;
/// The device gave up until it is reset.
pub const STATUS_NEEDS_RESET: u8 = 64;
/// VIRTIO_F_VERSION_1.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_EVENT_IDX.
const FEATURE_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_MSI_NO_VECTOR.
pub const NO_VECTOR: u16 = 0xffff;

/// Where the generation of the device's configuration is, of one byte.
pub const CONFIG_GENERATION: u64 = 21;

/// What the transport has to do after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The driver wrote 0 to the status.
    Reset,
    /// The driver is ready: start the device.
    Activate,
    /// The vector for configuration changes, or of queue `Some(index)`, is now this.
    Vector(Option<u16>, u16),
}

/// A queue as the driver set it up.
#[derive(Clone, Debug)]
struct QueueSetup {
    max_size: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, vector: NO_VECTOR, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }

    /// The queue, if its addresses are aligned and inside of `memory`.
    fn build(&self, memory: &GuestMemory, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }
}

/// The registers.
pub struct CommonConfig {
    offered: u64,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

impl CommonConfig {
    /// After reset, for a device that offers `features` (VERSION_1 is added) and has queues of `queue_sizes`.
    pub fn new(features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered: features | FEATURE_VERSION_1,
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|size| QueueSetup::new(*size)).collect(),
        }
    }

    /// Back to the state of [`CommonConfig::new`].
    pub fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// Tells the driver that the device does not work until it is reset.
    pub fn needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    /// Features both sides agreed on.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// Whether the driver has set the device up.
    #[cfg(test)]
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The queues that the driver enabled, with their indexes; `None` if one of them cannot be used as it was set up.
    pub fn build_queues(&self, memory: &GuestMemory) -> Option<Vec<(u16, Queue)>> {
        let event_idx = self.driver_features & FEATURE_EVENT_IDX != 0;
        let enabled = self.queues.iter().zip(0u16..).filter(|(queue, _)| queue.enabled);
        enabled.map(|(queue, index)| Some((index, queue.build(memory, event_idx)?))).collect()
    }

    /// Reads the field at `offset`. A read that is not of a whole field gives zeroes; 64-bit fields are read in halves.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.queue_select));
        let of_queue = |field: fn(&QueueSetup) -> u64| queue.map_or(0, field);
        let feature_word = |features: u64, select: u32| if select < 2 { features >> (32 * select) } else { 0 };
        let value = match (offset, data.len()) {
            (0, 4) => self.device_feature_select.into(),
            (4, 4) => feature_word(self.offered, self.device_feature_select),
            (8, 4) => self.driver_feature_select.into(),
            (12, 4) => feature_word(self.driver_features, self.driver_feature_select),
            (16, 2) => self.config_vector.into(),
            (18, 2) => self.queues.len() as u64,
            (20, 1) => self.status.into(),
            // The generation is the device's to tell (CONFIG_GENERATION).
            (CONFIG_GENERATION, 1) => 0,
            (22, 2) => self.queue_select.into(),
            (24, 2) => of_queue(|queue| queue.size.into()),
            (26, 2) => queue.map_or(NO_VECTOR, |queue| queue.vector).into(),
            (28, 2) => of_queue(|queue| queue.enabled.into()),
            (30, 2) => queue.map_or(0, |_| self.queue_select.into()),
            (32, 4) => of_queue(|queue| queue.descriptors),
            (36, 4) => of_queue(|queue| queue.descriptors >> 32),
            (40, 4) => of_queue(|queue| queue.driver),
            (44, 4) => of_queue(|queue| queue.driver >> 32),
            (48, 4) => of_queue(|queue| queue.device),
            (52, 4) => of_queue(|queue| queue.device >> 32),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (to, from) in data.iter_mut().zip(bytes.into_iter().chain(std::iter::repeat(0))) {
            *to = from;
        }
    }

    /// Writes the field at `offset`. A write that is not of a whole writable field is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        let mut bytes = [0; 4];
        bytes.get_mut(..data.len())?.copy_from_slice(data);
        let value = u32::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = value,
            (8, 4) => self.driver_feature_select = value,
            (12, 4) => self.set_driver_features(value),
            (16, 2) => {
                self.config_vector = self.existing_vector(value as u16);
                return Some(Action::Vector(None, self.config_vector));
            }
            (20, 1) => return self.set_status(value as u8),
            (22, 2) => self.queue_select = value as u16,
            (26, 2) => {
                let vector = self.existing_vector(value as u16);
                let index = self.queue_select;
                self.queues.get_mut(usize::from(index))?.vector = vector;
                return Some(Action::Vector(Some(index), vector));
            }
            (24 | 28 | 32..=52, _) => self.set_up_queue(offset, data.len(), value),
            _ => {}
        }
        None
    }

    /// A vector that the table does not have reads back as "no vector" (4.1.5.1.2.1).
    fn existing_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn set_driver_features(&mut self, word: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | u64::from(word),
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | u64::from(word) << 32,
            // Features that do not exist; what is not offered cannot be accepted, which FEATURES_OK checks for the others.
            _ => {}
        }
    }

    /// The driver may add status bits, and take all of them back by writing 0; it cannot take back single ones.
    fn set_status(&mut self, value: u8) -> Option<Action> {
        if value == 0 {
            return Some(Action::Reset);
        }
        let mut added = value & !self.status & !STATUS_NEEDS_RESET;
        let acceptable = self.driver_features & !self.offered == 0 && self.driver_features & FEATURE_VERSION_1 != 0;
        if !acceptable {
            added &= !STATUS_FEATURES_OK;
        }
        if (self.status | added) & STATUS_FEATURES_OK == 0 {
            added &= !STATUS_DRIVER_OK;
        }
        self.status |= added;
        (added & STATUS_DRIVER_OK != 0).then_some(Action::Activate)
    }

    /// Queues are set up before DRIVER_OK, and not changed once enabled.
    fn set_up_queue(&mut self, offset: u64, length: usize, value: u32) {
        let running = self.status & STATUS_DRIVER_OK != 0;
        let Some(queue) =
            self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.enabled && !running)
        else {
            return;
        };
        let low = |field: u64| (field & !0xffff_ffff) | u64::from(value);
        let high = |field: u64| (field & 0xffff_ffff) | u64::from(value) << 32;
        match (offset, length) {
            (24, 2) => queue.size = value as u16,
            (28, 2) => queue.enabled = value == 1,
            (32, 4) => queue.descriptors = low(queue.descriptors),
            (36, 4) => queue.descriptors = high(queue.descriptors),
            (40, 4) => queue.driver = low(queue.driver),
            (44, 4) => queue.driver = high(queue.driver),
            (48, 4) => queue.device = low(queue.device),
            (52, 4) => queue.device = high(queue.device),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OFFERED: u64 = 0b101;

    fn config() -> CommonConfig {
        CommonConfig::new(OFFERED, &[256, 64], 3)
    }

    fn read(config: &CommonConfig, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        config.read(offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    fn accept_features(config: &mut CommonConfig, features: u64) {
        for (select, word) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            config.write(8, &select.to_le_bytes());
            config.write(12, &word.to_le_bytes());
        }
    }

    fn to_features_ok(config: &mut CommonConfig, features: u64) -> bool {
        config.write(20, &[1]);
        config.write(20, &[3]);
        accept_features(config, features);
        config.write(20, &[11]);
        config.status() & STATUS_FEATURES_OK != 0
    }

    #[test]
    fn a_driver_that_follows_the_specification_activates_the_device() {
        let memory = crate::memory::allocate(32 << 20).expect("memory");
        let mut config = config();
        assert!(to_features_ok(&mut config, FEATURE_VERSION_1 | 0b100));
        config.write(22, &1u16.to_le_bytes());
        config.write(24, &32u16.to_le_bytes());
        for (offset, address) in [(32, 0x10_0000u32), (40, 0x10_1000), (48, 0x10_2000)] {
            config.write(offset, &address.to_le_bytes());
        }
        config.write(28, &1u16.to_le_bytes());
        assert_eq!(config.write(20, &[15]), Some(Action::Activate));
        assert_eq!(config.features(), FEATURE_VERSION_1 | 0b100);
        let queues = config.build_queues(&memory).expect("set up right");
        assert_eq!((queues.len(), queues[0].0, queues[0].1.size()), (1, 1, 32));
    }

    #[test]
    fn features_that_were_not_offered_and_legacy_drivers_do_not_get_features_ok() {
        assert!(!to_features_ok(&mut config(), FEATURE_VERSION_1 | 0b10));
        assert!(!to_features_ok(&mut config(), 0b1));
        let mut config = config();
        to_features_ok(&mut config, 0b1);
        assert_eq!(config.write(20, &[15]), None, "no DRIVER_OK without FEATURES_OK");
    }

    #[test]
    fn writing_zero_resets_from_any_state_and_other_bits_only_add_up() {
        let mut config = config();
        assert!(to_features_ok(&mut config, FEATURE_VERSION_1));
        config.write(20, &[1]);
        assert_eq!(config.status(), 11);
        assert_eq!(config.write(20, &[0]), Some(Action::Reset));
        config.reset();
        assert_eq!((config.status(), config.features()), (0, 0));
    }

    #[test]
    fn a_queue_outside_of_memory_or_of_a_bad_size_cannot_be_built() {
        let memory = crate::memory::allocate(32 << 20).expect("memory");
        for (size, descriptors) in [(0u16, 0x10_0000u32), (3, 0x10_0000), (512, 0x10_0000), (8, 0xf000_0000), (8, 1)] {
            let mut config = config();
            config.write(24, &size.to_le_bytes());
            config.write(32, &descriptors.to_le_bytes());
            config.write(40, &0x10_1000u32.to_le_bytes());
            config.write(48, &0x10_2000u32.to_le_bytes());
            config.write(28, &1u16.to_le_bytes());
            assert!(config.build_queues(&memory).is_none(), "{size} {descriptors:#x}");
        }
    }

    #[test]
    fn vectors_that_do_not_exist_read_back_as_none() {
        let mut config = config();
        assert_eq!(config.write(26, &2u16.to_le_bytes()), Some(Action::Vector(Some(0), 2)));
        assert_eq!(config.write(16, &3u16.to_le_bytes()), Some(Action::Vector(None, NO_VECTOR)));
        assert_eq!((read(&config, 26, 2), read(&config, 16, 2)), (2, NO_VECTOR.into()));
    }

    #[test]
    fn a_queue_that_does_not_exist_has_size_zero_and_ignores_writes() {
        let mut config = config();
        config.write(22, &2u16.to_le_bytes());
        config.write(24, &8u16.to_le_bytes());
        assert_eq!(config.write(26, &0u16.to_le_bytes()), None);
        assert_eq!((read(&config, 24, 2), read(&config, 26, 2)), (0, NO_VECTOR.into()));
    }

    proptest! {
        #[test]
        fn no_sequence_of_accesses_panics_or_breaks_the_order_of_states(
            accesses in prop::collection::vec((0u64..64, prop::collection::vec(any::<u8>(), 1..=8)), 0..200)
        ) {
            let memory = crate::memory::allocate(32 << 20).expect("memory");
            let mut config = config();
            for (offset, data) in accesses {
                if config.write(offset, &data) == Some(Action::Reset) {
                    config.reset();
                }
                let mut back = vec![0; data.len()];
                config.read(offset, &mut back);
                let _ = config.build_queues(&memory);
                let status = config.status();
                prop_assert!(status & STATUS_DRIVER_OK == 0 || status & STATUS_FEATURES_OK != 0);
                prop_assert!(status & STATUS_FEATURES_OK == 0 || config.features() & !(OFFERED | FEATURE_VERSION_1) == 0);
            }
        }
    }
}
