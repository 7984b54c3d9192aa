//! A queue anywhere in a memory of anything.

use std::io;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::chain::{Buffers, Chain};
use super::queue::{DeviceQueue, Popped};
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt};

const MEMORY: usize = 16 << 10;

struct Nobody;

impl Interrupt for Nobody {
    fn signal_queue(&self, _index: u16) -> io::Result<()> {
        Ok(())
    }
    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug, Arbitrary)]
struct Setup {
    size: u8,
    descriptors: u16,
    available: u16,
    used: u16,
    event_idx: bool,
    readable: Vec<Use>,
    writable: Vec<Use>,
}

/// What a device does with the buffers of a chain.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Use {
    Read(u8),
    Write(u8),
    Skip(u32),
    Truncate(u32),
    LastByte,
    Slices,
}

/// Walks the chains of a queue whose rings are where the input says, in a memory that holds the rest of the input, and uses
/// their buffers in any way.
pub fn chain(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok(setup) = Setup::arbitrary(&mut input) else { return };
    thread_local! {
        static MEMORY_ONCE: GuestMemory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("mapped");
    }
    let memory = MEMORY_ONCE.with(Clone::clone);
    let mut bytes = [0; MEMORY];
    let rest = input.take_rest();
    let length = rest.len().min(MEMORY);
    bytes[..length].copy_from_slice(&rest[..length]);
    memory.write_slice(&bytes, GuestAddress(0)).expect("in memory");

    let size = 1u16 << (setup.size % 5);
    let mut queue = Queue::new(size).expect("a power of two");
    queue.set_desc_table_address(Some(u32::from(setup.descriptors) & !15), Some(0));
    queue.set_avail_ring_address(Some(u32::from(setup.available) & !1), Some(0));
    queue.set_used_ring_address(Some(u32::from(setup.used) & !3), Some(0));
    queue.set_ready(true);
    if !queue.is_valid(&memory) {
        return;
    }
    let active = ActiveQueue { index: 0, queue, notify: EventFd::new(EFD_NONBLOCK).expect("an eventfd") };
    let interrupt: Arc<dyn Interrupt> = Arc::new(Nobody);
    let mut queue = DeviceQueue::new(active, u64::from(setup.event_idx) << 29, &memory, &interrupt);
    let mut chain = Chain::default();
    for _ in 0..8 {
        match queue.pop(&mut chain) {
            Ok(Popped::Chain(head)) => {
                setup.readable.iter().for_each(|action| act(*action, &mut chain.readable, &memory));
                setup.writable.iter().for_each(|action| act(*action, &mut chain.writable, &memory));
                if queue.add_used(head, 1).is_err() {
                    return;
                }
            }
            Ok(Popped::Malformed) => {}
            Ok(Popped::Empty) => break,
            Err(_) => return,
        }
    }
    // A guest may break any of it; the device then stops.
    let _ = queue.disable_notification().and_then(|()| queue.enable_notification()).and_then(|_| queue.signal());
}

fn act(action: Use, buffers: &mut Buffers, memory: &GuestMemory) {
    let before = buffers.len();
    let after = match action {
        Use::Read(count) => {
            let fits = buffers.read(memory, &mut vec![0; count.into()]).is_some();
            assert_eq!(fits, usize::from(count) <= before);
            if fits { before - usize::from(count) } else { before }
        }
        Use::Write(count) => {
            let fits = buffers.write(memory, &vec![0x5a; count.into()]).is_some();
            assert_eq!(fits, usize::from(count) <= before);
            if fits { before - usize::from(count) } else { before }
        }
        Use::Skip(count) => {
            buffers.skip(count as usize);
            before.saturating_sub(count as usize)
        }
        Use::Truncate(length) => {
            buffers.truncate(length as usize);
            before.min(length as usize)
        }
        Use::LastByte => {
            assert_eq!(buffers.take_last_byte().is_some(), before > 0);
            before.saturating_sub(1)
        }
        Use::Slices => before,
    };
    assert_eq!(buffers.len(), after);
    assert_eq!(buffers.slices(memory).map(|slice| slice.len()).sum::<usize>(), after);
}
