use vm_memory::Bytes;

use super::super::MsiMessage;
use super::super::config_space::COMMAND_MEMORY;
use super::*;
use crate::virtio::ActivateError;

const BAR: u32 = 0xc000_8000;
const FEATURE: u64 = 1 << 5;

/// What happened, in order.
type Log = Arc<Mutex<Vec<String>>>;

struct TestDevice {
    log: Log,
    fails: bool,
}

impl VirtioDevice for TestDevice {
    fn device_type(&self) -> u16 {
        2
    }
    fn name(&self) -> String {
        "test".into()
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &[128, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.log.lock().push(format!("config {offset} {data:?}"));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues: Vec<_> = activation.queues.iter().map(|queue| queue.index).collect();
        self.log.lock().push(format!("activate {queues:?} {:#x}", activation.features));
        activation.interrupt.signal_queue(0).expect("recorded only");
        if self.fails {
            return Err(ActivateError { device: self.name(), what: "test", source: io::Error::other("test") });
        }
        Ok(())
    }
    fn reset(&mut self) {
        self.log.lock().push("reset".into());
    }
}

struct Recorder(Log);

impl VectorBackend for Recorder {
    fn route(&mut self, vector: u16, message: MsiMessage) -> io::Result<()> {
        self.0.lock().push(format!("route {vector} {:#x}", message.data));
        Ok(())
    }
    fn fire(&self, vector: u16) -> io::Result<()> {
        self.0.lock().push(format!("fire {vector}"));
        Ok(())
    }
}

impl Notifications for Recorder {
    fn attach(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.0.lock().push(format!("attach {address:#x}"));
        Ok(())
    }
    fn detach(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.0.lock().push(format!("detach {address:#x}"));
        Ok(())
    }
}

fn function(fails: bool) -> (VirtioFunction, Log) {
    let log = Log::default();
    let recorder = || Box::new(Recorder(Arc::clone(&log)));
    let memory = crate::memory::allocate(32 << 20).expect("memory");
    let starter = Arc::new(Starter::start().unwrap());
    let device = Box::new(TestDevice { log: Arc::clone(&log), fails });
    (VirtioFunction::new(device, memory, starter, BAR, recorder(), recorder()), log)
}

/// Does what a driver does (virtio 1.2, 3.1.1) with queue 1 and MSI-X vector 1.
fn drive(function: &mut VirtioFunction) {
    function.write_config(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    for status in [1, 3] {
        function.write_memory(COMMON + 20, &[status]);
    }
    for (select, word) in [(0u32, FEATURE as u32), (1, 1)] {
        function.write_memory(COMMON + 8, &select.to_le_bytes());
        function.write_memory(COMMON + 12, &word.to_le_bytes());
    }
    function.write_memory(COMMON + 20, &[11]);
    let control = function.msix_control;
    function.write_config(control, &0x8000u16.to_le_bytes());
    function.write_memory(MSIX_TABLE + 16 + 8, &0x31u32.to_le_bytes());
    function.write_memory(MSIX_TABLE + 16 + 12, &0u32.to_le_bytes());
    for (queue, base) in [(0u16, 0x10_0000u32), (1, 0x20_0000)] {
        function.write_memory(COMMON + 22, &queue.to_le_bytes());
        function.write_memory(COMMON + 26, &1u16.to_le_bytes());
        for (offset, address) in [(32, base), (40, base + 0x1_0000), (48, base + 0x2_0000)] {
            function.write_memory(COMMON + offset, &address.to_le_bytes());
        }
        function.write_memory(COMMON + 28, &1u16.to_le_bytes());
    }
    function.write_memory(COMMON + 20, &[15]);
}

fn status(function: &mut VirtioFunction) -> u8 {
    let mut status = [0];
    function.read_memory(COMMON + 20, &mut status);
    status[0]
}

#[test]
fn a_driver_gets_its_device_with_notifications_and_interrupts() {
    let (mut function, log) = function(false);
    drive(&mut function);
    assert_eq!(
        *log.lock(),
        ["route 1 0x31", "attach 0xc000b000", "attach 0xc000b004", "activate [0, 1] 0x100000020", "fire 1"]
    );
    assert_eq!(status(&mut function), 15);
}

#[test]
fn notifications_follow_the_bar() {
    let (mut function, log) = function(false);
    drive(&mut function);
    log.lock().clear();
    function.write_config(COMMAND, &0u16.to_le_bytes());
    assert_eq!(function.memory_bar(), None);
    function.write_config(BAR0, &0xd000_0000u32.to_le_bytes());
    function.write_config(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    assert_eq!(*log.lock(), ["detach 0xc000b000", "detach 0xc000b004", "attach 0xd0003000", "attach 0xd0003004"]);
}

#[test]
fn a_reset_stops_the_device_and_forgets_the_drivers_settings() {
    let (mut function, log) = function(false);
    drive(&mut function);
    log.lock().clear();
    function.write_memory(COMMON + 20, &[0]);
    assert_eq!(*log.lock(), ["detach 0xc000b000", "detach 0xc000b004", "reset"]);
    assert_eq!(status(&mut function), 0);
    let interrupt = Arc::clone(&function.interrupt);
    interrupt.signal_queue(1).expect("ignored");
    assert_eq!(log.lock().len(), 3, "no vector is left");
    drive(&mut function);
    assert_eq!(status(&mut function), 15, "a second driver can start it again");
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let (mut function, log) = function(true);
    drive(&mut function);
    assert_eq!(status(&mut function), 15 | 64);
    assert!(function.queue_events.is_empty());
    assert!(log.lock().iter().any(|line| line.starts_with("detach")));
}

#[test]
fn dropping_an_active_function_detaches_and_resets() {
    let (mut function, log) = function(false);
    drive(&mut function);
    log.lock().clear();
    drop(function);
    assert_eq!(*log.lock(), ["detach 0xc000b000", "detach 0xc000b004", "reset"]);
}

#[test]
fn capabilities_lead_to_structures_inside_of_the_bar() {
    let (function, _) = function(false);
    let byte = |offset: u16| {
        let mut byte = [0];
        function.read_config(offset, &mut byte);
        byte[0]
    };
    let word = |offset: u16| {
        let mut word = [0; 4];
        function.read_config(offset, &mut word);
        u64::from(u32::from_le_bytes(word))
    };
    let mut pointer = u16::from(byte(0x34));
    let mut found = vec![];
    while pointer != 0 {
        if byte(pointer) == CAPABILITY_VENDOR {
            assert!(word(pointer + 8) + word(pointer + 12) <= BAR_SIZE);
            found.push(byte(pointer + 3));
        } else {
            assert_eq!(byte(pointer), CAPABILITY_MSIX);
            assert_eq!(word(pointer) >> 16, 2, "three vectors");
        }
        pointer = byte(pointer + 1).into();
    }
    assert_eq!(found, [1, 2, 3, 4]);
}

#[test]
fn a_notification_that_takes_the_slow_path_reaches_its_queue_only() {
    let (mut function, _) = function(false);
    drive(&mut function);
    function.write_memory(NOTIFY + 4, &1u16.to_le_bytes());
    function.write_memory(NOTIFY + 8, &2u16.to_le_bytes());
    let counts: Vec<_> = function.queue_events.iter().map(|(_, event)| event.read().ok()).collect();
    assert_eq!(counts, [None, Some(1)]);
}

#[test]
fn queues_outside_of_memory_need_a_reset() {
    let (mut function, log) = function(false);
    function.write_memory(COMMON + 32, &0xf000_0000u32.to_le_bytes());
    function.write_memory(COMMON + 40, &0xf000_0000u32.to_le_bytes());
    function.write_memory(COMMON + 48, &0xf000_0000u32.to_le_bytes());
    function.write_memory(COMMON + 28, &1u16.to_le_bytes());
    drive(&mut function);
    assert_eq!(status(&mut function), 15 | 64);
    assert!(!log.lock().iter().any(|line| line.starts_with("activate")));
}

proptest::proptest! {
    #[test]
    fn no_access_panics(
        accesses in proptest::collection::vec(
            (proptest::bool::ANY, 0..BAR_SIZE, proptest::collection::vec(proptest::num::u8::ANY, 1..=8)), 0..100
        )
    ) {
        let (mut function, _) = function(false);
        function.memory.write_obj(0u64, vm_memory::GuestAddress(0)).expect("in memory");
        for (config, offset, mut data) in accesses {
            if config {
                data.truncate(4 - (offset % 4) as usize);
                function.write_config((offset % 4096) as u16, &data);
                function.read_config((offset % 4096) as u16, &mut data);
            } else {
                function.write_memory(offset, &data);
                function.read_memory(offset, &mut data);
            }
        }
    }
}
