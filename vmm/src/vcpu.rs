//! vCPU threads, and how they are paused and stopped.
//!
//! ```text
//!            pause                stop, or an end of the VM
//! Running <---------> Paused      Running, Paused ----------> Finished
//!            resume
//! ```
//!
//! Each thread goes from state to state; what it should be in is in the [`VcpuSet`]'s shared part. A change there is
//! followed by a kick, which brings a thread out of `KVM_RUN`. Finished is terminal; [`VcpuSet::stop`] joins the threads.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_SYSTEM_EVENT_SHUTDOWN, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};

use crate::exit::{Exit, Reason};
use crate::io_bus::IoBus;
use crate::jail::seccomp::{self, Thread};
use crate::sys::kick::{self, Kickable};

/// How long all vCPUs may take to leave the guest. An access to a register never takes long.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// What the threads should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

/// What a thread is doing.
enum State {
    Running,
    Paused,
    Finished,
}

struct Gate {
    wanted: Wanted,
    paused: usize,
    exit: Option<Exit>,
}

struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    exits: AtomicU64,
    bus: Arc<IoBus>,
    /// Written when the VM has ended by itself.
    ended: OwnedFd,
}

/// Why vCPUs could not be started or paused.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// No thread.
    #[error("cannot start the thread of vCPU {index}")]
    Thread {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No eventfd or signal handler.
    #[error("cannot set up the {0}")]
    SetUp(&'static str, #[source] io::Error),
    /// A vCPU did not leave the guest in time.
    #[error("{missing} vCPUs did not pause within {PAUSE_DEADLINE:?}")]
    PauseTimeout {
        /// How many.
        missing: usize,
    },
}

/// All vCPUs of a VM.
pub struct VcpuSet {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuSet {
    /// Starts a thread for each of `vcpus`. In a jail the calling thread is confined to what serves the VM from here on.
    pub fn start(vcpus: Vec<VcpuFd>, bus: Arc<IoBus>) -> Result<Self, VcpuError> {
        kick::install_handler().map_err(|source| VcpuError::SetUp("kick signal", source))?;
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|source| VcpuError::SetUp("eventfd", source.into()))?;
        let gate = Gate { wanted: Wanted::Run, paused: 0, exit: None };
        let shared =
            Arc::new(Shared { gate: Mutex::new(gate), changed: Condvar::new(), exits: AtomicU64::new(0), bus, ended });
        let mut set = Self { shared, threads: vec![] };
        let confine = |thread| seccomp::confine(thread).map_err(|source| VcpuError::SetUp("seccomp filter", source));
        confine(Thread::Start)?;
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let shared = Arc::clone(&set.shared);
            let thread = Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    seccomp::confine_started(Thread::Vcpu);
                    Runner { index, vcpu: Kickable::new(vcpu), shared }.run();
                })
                .map_err(|source| VcpuError::Thread { index, source })?;
            set.threads.push(thread);
        }
        confine(Thread::Main)?;
        Ok(set)
    }

    /// How many there are, brought up by the guest or not.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Readable once the VM has ended by itself.
    pub fn ended(&self) -> &OwnedFd {
        &self.shared.ended
    }

    /// Why the VM has ended by itself, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.shared.gate.lock().exit.clone()
    }

    /// Returns of `KVM_RUN` to user space so far.
    pub fn userspace_exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    /// Whether the vCPUs are paused.
    pub fn is_paused(&self) -> bool {
        self.shared.gate.lock().wanted == Wanted::Pause
    }

    /// Brings all vCPUs out of the guest and returns when they are. Idempotent.
    pub fn pause(&self) -> Result<(), VcpuError> {
        let deadline = Instant::now() + PAUSE_DEADLINE;
        self.want(Wanted::Pause);
        let mut gate = self.shared.gate.lock();
        while gate.paused < self.threads.len() && gate.exit.is_none() {
            if self.shared.changed.wait_until(&mut gate, deadline).timed_out() {
                let missing = self.threads.len() - gate.paused;
                drop(gate);
                self.want(Wanted::Run);
                return Err(VcpuError::PauseTimeout { missing });
            }
        }
        Ok(())
    }

    /// Lets the vCPUs go on. Idempotent.
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Stops the vCPUs and joins their threads. Idempotent.
    pub fn stop(&mut self) {
        self.want(Wanted::Stop);
        for thread in self.threads.drain(..) {
            // A panic in a thread has ended the process by the panic hook already.
            let _ = thread.join();
        }
    }

    fn want(&self, wanted: Wanted) {
        let mut gate = self.shared.gate.lock();
        if gate.wanted != Wanted::Stop {
            gate.wanted = wanted;
        }
        self.shared.changed.notify_all();
        drop(gate);
        for thread in &self.threads {
            // The handle is not joined yet, so the only failure would be a thread that is gone, which needs no kick.
            let _ = kick::kick(thread);
        }
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What an exit means for the loop.
enum Next {
    Enter,
    End(Exit),
    /// An end whose message is made with the registers.
    Broken(String),
}

/// One vCPU on its thread.
struct Runner {
    index: usize,
    vcpu: Kickable,
    shared: Arc<Shared>,
}

impl Runner {
    fn run(mut self) {
        // A kick before this thread could take one is not lost: what is wanted was changed before it.
        let mut state = match self.shared.gate.lock().wanted {
            Wanted::Run => State::Running,
            Wanted::Pause => State::Paused,
            Wanted::Stop => State::Finished,
        };
        loop {
            state = match state {
                State::Running => self.running(),
                State::Paused => self.paused(),
                State::Finished => return,
            };
        }
    }

    /// Runs the guest until something else is wanted.
    fn running(&mut self) -> State {
        loop {
            match self.enter() {
                Next::Enter => {}
                Next::End(exit) => return self.end(exit),
                Next::Broken(message) => {
                    let registers = self.registers();
                    let message = format!("vCPU {}: {message}; {registers}", self.index);
                    return self.end(Exit::new(Reason::Internal, message));
                }
            }
            match self.wanted_after_kick() {
                None | Some(Wanted::Run) => {}
                Some(Wanted::Pause) => return State::Paused,
                Some(Wanted::Stop) => return State::Finished,
            }
        }
    }

    /// What is wanted, if this vCPU was kicked since the last time.
    fn wanted_after_kick(&mut self) -> Option<Wanted> {
        if self.vcpu.vcpu().get_kvm_run().immediate_exit == 0 {
            return None;
        }
        self.vcpu.clear();
        Some(self.shared.gate.lock().wanted)
    }

    /// Waits until something else than a pause is wanted.
    fn paused(&mut self) -> State {
        // Tells the guest's watchdogs that time passed. A guest without kvmclock has nothing to be told.
        let _ = self.vcpu.vcpu().kvmclock_ctrl();
        let mut gate = self.shared.gate.lock();
        gate.paused += 1;
        self.shared.changed.notify_all();
        while gate.wanted == Wanted::Pause {
            self.shared.changed.wait(&mut gate);
        }
        gate.paused -= 1;
        if gate.wanted == Wanted::Stop { State::Finished } else { State::Running }
    }

    fn end(&self, exit: Exit) -> State {
        let mut gate = self.shared.gate.lock();
        // The first end is the cause; what other vCPUs then run into is not.
        gate.exit.get_or_insert(exit);
        self.shared.changed.notify_all();
        drop(gate);
        // A full counter is readable, too.
        let _ = rustix::io::write(&self.shared.ended, &1u64.to_ne_bytes());
        State::Finished
    }

    /// Enters the guest once and does what its exit asks for.
    fn enter(&mut self) -> Next {
        let bus = &self.shared.bus;
        let exit = self.vcpu.vcpu().run();
        self.shared.exits.fetch_add(1, Ordering::Relaxed);
        match exit {
            Ok(VcpuExit::IoIn(port, data)) => bus.port_in(port, data),
            Ok(VcpuExit::IoOut(port, data)) => return bus.port_out(port, data).map_or(Next::Enter, Next::End),
            Ok(VcpuExit::MmioRead(address, data)) => bus.memory_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.memory_write(address, data),
            Ok(VcpuExit::Shutdown) => {
                return Next::End(Exit::new(Reason::GuestCrash, "triple fault: the guest crashed or reset"));
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                return Next::End(Exit::new(Reason::GuestPowerOff, "the guest powered itself off"));
            }
            Ok(VcpuExit::SystemEvent(event, _)) => {
                return Next::End(Exit::new(
                    Reason::GuestCrash,
                    format!("the guest crashed (KVM system event {event})"),
                ));
            }
            // With the local APIC in KVM, HLT waits there; without an interrupt to come it returns only for a kick.
            Ok(VcpuExit::Intr | VcpuExit::Hlt) => {}
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Next::Broken(format!(
                    "the hardware refuses to enter the guest on CPU {cpu}, reason {reason:#x}"
                ));
            }
            Ok(VcpuExit::InternalError) => return Next::Broken("KVM cannot emulate what the guest does".into()),
            Ok(other) => return Next::Broken(format!("unexpected exit {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) if error.errno() == libc::EFAULT => {
                return Next::End(Exit::new(Reason::GuestCrash, "the guest uses memory that it has not been given"));
            }
            Err(error) => return Next::Broken(format!("KVM_RUN fails: {}", io::Error::from(error))),
        }
        Next::Enter
    }

    /// The registers that tell where a guest is, for the message of an end nobody expected.
    fn registers(&mut self) -> String {
        let vcpu = self.vcpu.vcpu();
        let kvm_regs { rip, rsp, rax, rbx, rcx, rdx, rsi, rdi, rflags, .. } = vcpu.get_regs().unwrap_or_default();
        let kvm_sregs { cr0, cr2, cr3, cr4, efer, cs, .. } = vcpu.get_sregs().unwrap_or_default();
        format!(
            "rip={rip:#x} cs={:#x} rsp={rsp:#x} rflags={rflags:#x} rax={rax:#x} rbx={rbx:#x} rcx={rcx:#x} rdx={rdx:#x} \
             rsi={rsi:#x} rdi={rdi:#x} cr0={cr0:#x} cr2={cr2:#x} cr3={cr3:#x} cr4={cr4:#x} efer={efer:#x}",
            cs.selector
        )
    }
}
