//! Interrupt routes in KVM: the I/O APIC's pins, and one route and irqfd for each MSI-X vector in use.
//!
//! `KVM_SET_GSI_ROUTING` replaces the whole table, so one owner keeps all of it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::layout::IO_APIC_PINS;
use crate::pci::{MsiMessage, VectorBackend};

/// KVM's own limit on routes (`KVM_MAX_IRQ_ROUTES`), which bounds the numbers.
const GSI_LIMIT: u32 = 4096;

/// All interrupt routes of a VM.
pub struct InterruptRoutes {
    vm: Arc<VmFd>,
    /// Routes of message-signalled interrupts by their global system interrupt number. `None`: the number is taken, but has
    /// no route yet.
    messages: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
}

impl InterruptRoutes {
    /// The routes of `vm`, which has its in-kernel interrupt controllers and so routes to the I/O APIC already.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, messages: Mutex::default() })
    }

    /// An eventfd that raises `pin` of the I/O APIC once per write.
    pub fn pin(&self, pin: u32) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.vm.register_irqfd(&event, pin)?;
        Ok(event)
    }

    fn allocate(self: &Arc<Self>) -> io::Result<MsiLine> {
        let mut messages = self.messages.lock();
        let number = (IO_APIC_PINS..GSI_LIMIT)
            .find(|number| !messages.contains_key(number))
            .ok_or_else(|| io::Error::other("all interrupt routes are taken"))?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.vm.register_irqfd(&event, number)?;
        messages.insert(number, None);
        drop(messages);
        Ok(MsiLine { routes: Arc::clone(self), number, event })
    }

    fn set(&self, number: u32, message: MsiMessage) -> io::Result<()> {
        let mut messages = self.messages.lock();
        if messages.get(&number) == Some(&Some(message)) {
            return Ok(());
        }
        messages.insert(number, Some(message));
        self.vm.set_gsi_routing(&routing_table(&messages)?).map_err(io::Error::from)
    }
}

fn routing_table(messages: &BTreeMap<u32, Option<MsiMessage>>) -> io::Result<KvmIrqRouting> {
    let pins = (0..IO_APIC_PINS).map(|pin| {
        let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin };
        entry
    });
    let messages = messages.iter().filter_map(|(&gsi, message)| message.map(|message| (gsi, message)));
    let messages = messages.map(|(gsi, message)| {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi = kvm_irq_routing_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        entry
    });
    let entries: Vec<_> = pins.chain(messages).collect();
    KvmIrqRouting::from_entries(&entries).map_err(|_| io::Error::other("too many interrupt routes"))
}

/// One number with its irqfd; both are given back on drop.
struct MsiLine {
    routes: Arc<InterruptRoutes>,
    number: u32,
    event: EventFd,
}

impl Drop for MsiLine {
    fn drop(&mut self) {
        // It was registered with the same arguments; nothing can be done about a VM that forgot it.
        let _ = self.routes.vm.unregister_irqfd(&self.event, self.number);
        // The route itself goes with the next change of the table: without an irqfd nothing uses it.
        self.routes.messages.lock().remove(&self.number);
    }
}

/// The vectors of one PCI function. A vector gets its number and irqfd when it is first routed.
pub struct KvmVectors {
    routes: Arc<InterruptRoutes>,
    lines: BTreeMap<u16, MsiLine>,
}

impl KvmVectors {
    /// No vector is routed yet.
    pub fn new(routes: Arc<InterruptRoutes>) -> Self {
        Self { routes, lines: BTreeMap::new() }
    }
}

impl VectorBackend for KvmVectors {
    fn route(&mut self, vector: u16, message: MsiMessage) -> io::Result<()> {
        if !self.lines.contains_key(&vector) {
            self.lines.insert(vector, self.routes.allocate()?);
        }
        self.routes.set(self.lines[&vector].number, message)
    }

    fn fire(&self, vector: u16) -> io::Result<()> {
        self.lines.get(&vector).map_or(Ok(()), |line| line.event.write(1))
    }
}
