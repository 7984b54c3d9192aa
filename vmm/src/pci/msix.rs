//! MSI-X: the vector table, the pending bits, and when a vector may fire (PCI local bus specification 3.0, 6.8.2).

use std::io;

/// Bytes of a table entry.
pub const ENTRY_BYTES: u64 = 16;
/// Most vectors a function here may have, so that the table fits its page.
pub const MAX_VECTORS: u16 = 256;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// What a device writes to the interrupt controller to raise an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Delivers messages.
pub trait VectorBackend: Send {
    /// From now on `vector` raises `message`.
    fn route(&mut self, vector: u16, message: MsiMessage) -> io::Result<()>;
    /// Raises the message that `vector` is routed to. Never blocks.
    fn fire(&self, vector: u16) -> io::Result<()>;
}

#[derive(Clone, Copy)]
struct Vector {
    message: MsiMessage,
    control: u32,
    pending: bool,
    routed: Option<MsiMessage>,
}

/// The vectors of one function.
pub struct Msix {
    vectors: Vec<Vector>,
    control: u16,
    backend: Box<dyn VectorBackend>,
}

impl Msix {
    /// `count` masked vectors, MSI-X off.
    pub fn new(count: u16, backend: Box<dyn VectorBackend>) -> Self {
        assert!((1..=MAX_VECTORS).contains(&count), "the transport gives a vector for each queue and one more");
        let vector = Vector {
            message: MsiMessage { address: 0, data: 0 },
            control: VECTOR_MASKED,
            pending: false,
            routed: None,
        };
        Self { vectors: vec![vector; count.into()], control: 0, backend }
    }

    /// The message control register as the guest wrote it (6.8.2.3).
    pub fn set_control(&mut self, control: u16) {
        self.control = control;
        for vector in 0..self.vectors.len() {
            self.update(vector);
        }
    }

    /// Raises `vector`, or leaves it pending while it is masked. One that does not exist, such as "no vector", does nothing.
    pub fn raise(&mut self, vector: u16) -> io::Result<()> {
        let index = usize::from(vector);
        if index >= self.vectors.len() || self.control & CONTROL_ENABLE == 0 {
            return Ok(());
        }
        if !self.deliverable(index) {
            self.vectors[index].pending = true;
            return Ok(());
        }
        self.backend.fire(vector)
    }

    fn deliverable(&self, index: usize) -> bool {
        self.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE
            && self.vectors[index].control & VECTOR_MASKED == 0
    }

    /// Routes the vector if it may fire now, and delivers what was pending.
    fn update(&mut self, index: usize) {
        if !self.deliverable(index) {
            return;
        }
        let number = index as u16;
        let vector = &mut self.vectors[index];
        if vector.routed != Some(vector.message) {
            // A route that KVM refuses is one the guest made up; its interrupts then go nowhere.
            vector.routed = self.backend.route(number, vector.message).is_ok().then_some(vector.message);
        }
        if std::mem::take(&mut vector.pending) {
            // An eventfd that is full has an interrupt on its way already.
            let _ = self.backend.fire(number);
        }
    }

    /// Reads the table; `offset` is from its start. Registers are 32 bits wide, and may be read in pairs.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        for (chunk, offset) in data.chunks_exact_mut(4).zip((offset..).step_by(4)) {
            let value =
                self.vectors.get((offset / ENTRY_BYTES) as usize).map_or(0, |vector| match offset % ENTRY_BYTES {
                    0 => vector.message.address as u32,
                    4 => (vector.message.address >> 32) as u32,
                    8 => vector.message.data,
                    _ => vector.control,
                });
            chunk.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Writes the table, with the same rules.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let index = (offset / ENTRY_BYTES) as usize;
        let Some(vector) = self.vectors.get_mut(index) else { return };
        for (chunk, offset) in data.as_chunks::<4>().0.iter().zip((offset..).step_by(4)) {
            let value = u32::from_le_bytes(*chunk);
            let message = &mut vector.message;
            match offset % ENTRY_BYTES {
                0 => message.address = (message.address & !0xffff_ffff) | u64::from(value & !0b11),
                4 => message.address = (message.address & 0xffff_ffff) | u64::from(value) << 32,
                8 => message.data = value,
                _ => vector.control = value & VECTOR_MASKED,
            }
        }
        self.update(index);
    }

    /// Reads the pending bits; `offset` is from their start.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (byte, position) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(position).unwrap_or(usize::MAX).saturating_mul(8);
            let bits = self.vectors.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, vector)| byte | u8::from(vector.pending) << bit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    type Log = Arc<Mutex<Vec<String>>>;

    struct Recorder(Log);

    impl VectorBackend for Recorder {
        fn route(&mut self, vector: u16, message: MsiMessage) -> io::Result<()> {
            self.0.lock().push(format!("route {vector} {:#x} {:#x}", message.address, message.data));
            Ok(())
        }

        fn fire(&self, vector: u16) -> io::Result<()> {
            self.0.lock().push(format!("fire {vector}"));
            Ok(())
        }
    }

    fn msix(count: u16) -> (Msix, Log) {
        let log = Log::default();
        (Msix::new(count, Box::new(Recorder(Arc::clone(&log)))), log)
    }

    fn program(msix: &mut Msix, vector: u64, masked: u32) {
        msix.write_table(vector * 16, &0xfee0_1000u32.to_le_bytes());
        msix.write_table(vector * 16 + 4, &0u32.to_le_bytes());
        msix.write_table(vector * 16 + 8, &0x21u32.to_le_bytes());
        msix.write_table(vector * 16 + 12, &masked.to_le_bytes());
    }

    fn pending(msix: &Msix) -> u64 {
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    }

    #[test]
    fn a_vector_fires_only_when_enabled_and_unmasked() {
        let (mut msix, log) = msix(2);
        program(&mut msix, 1, 0);
        msix.raise(1).expect("no backend error");
        assert!(log.lock().is_empty());
        msix.set_control(CONTROL_ENABLE);
        msix.raise(1).expect("no backend error");
        assert_eq!(*log.lock(), ["route 1 0xfee01000 0x21", "fire 1"]);
    }

    #[test]
    fn what_is_raised_while_masked_is_pending_and_fires_once_when_unmasked() {
        for mask_all in [true, false] {
            let (mut msix, log) = msix(3);
            msix.set_control(CONTROL_ENABLE | if mask_all { CONTROL_MASK_ALL } else { 0 });
            program(&mut msix, 2, u32::from(!mask_all));
            msix.raise(2).expect("no backend error");
            msix.raise(2).expect("no backend error");
            assert_eq!(pending(&msix), 0b100);
            msix.set_control(CONTROL_ENABLE);
            msix.write_table(2 * 16 + 12, &0u32.to_le_bytes());
            assert_eq!(log.lock().iter().filter(|line| *line == "fire 2").count(), 1);
            assert_eq!(pending(&msix), 0);
        }
    }

    #[test]
    fn an_unchanged_message_is_routed_once() {
        let (mut msix, log) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 0, 0);
        for masked in [1u32, 0, 1, 0] {
            msix.write_table(12, &masked.to_le_bytes());
        }
        assert_eq!(*log.lock(), ["route 0 0xfee01000 0x21"]);
        msix.write_table(8, &0x22u32.to_le_bytes());
        assert_eq!(log.lock().last().expect("two"), "route 0 0xfee01000 0x22");
    }

    #[test]
    fn accesses_of_odd_width_or_past_the_end_do_nothing() {
        let (mut msix, log) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        for (offset, length) in [(12, 1), (13, 4), (10, 8), (16, 4), (1 << 40, 8), (4, 8)] {
            msix.write_table(offset, &vec![0; length]);
            let mut data = vec![0xaa; length];
            msix.read_table(offset, &mut data);
            assert_eq!(data, vec![0; length], "{offset} {length}");
        }
        let mut control = [0; 4];
        msix.read_table(12, &mut control);
        assert_eq!((control, log.lock().len()), ([1, 0, 0, 0], 0));
        msix.raise(1).expect("ignored");
        msix.raise(u16::MAX).expect("ignored");
        let mut bits = [0xff; 8];
        msix.read_pending(1 << 20, &mut bits);
        assert_eq!(bits, [0; 8]);
    }

    #[test]
    fn pairs_of_registers_may_be_accessed_at_once() {
        let (mut msix, _) = msix(1);
        msix.write_table(0, &0x0000_0001_fee0_0000u64.to_le_bytes());
        let mut address = [0; 8];
        msix.read_table(0, &mut address);
        assert_eq!(u64::from_le_bytes(address), 0x0000_0001_fee0_0000);
    }
}
