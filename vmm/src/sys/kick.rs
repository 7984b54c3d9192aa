//! Getting a vCPU thread out of `KVM_RUN`.
//!
//! A signal makes `KVM_RUN` return EINTR, but one that arrives just before the system call would be lost. So its handler sets
//! `immediate_exit` in the `kvm_run` page of the thread it interrupts, and the next `KVM_RUN` returns at once
//! (KVM API, section 5).

use std::cell::Cell;
use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// The `kvm_run` page of the vCPU that runs on this thread, or null.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: a non-null pointer is to the page of the `VcpuFd` that this thread's `Kickable` owns, so it is mapped.
        // The kernel and this thread are its only users, and the write is one byte.
        unsafe { ptr::addr_of_mut!((*page).immediate_exit).write_volatile(1) };
    }
}

/// Installs the handler of the kick signal. Once per process, before any vCPU thread starts.
pub fn install_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)
}

/// Makes the vCPU that runs on `thread` leave `KVM_RUN`, now or at its next entry.
pub fn kick<T>(thread: &JoinHandle<T>) -> io::Result<()> {
    // SAFETY: the handle has not been joined, so the thread's id is valid.
    let result = unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// A vCPU bound to the thread that runs it.
pub struct Kickable {
    vcpu: VcpuFd,
    /// Not `Send`: the thread-local pointer belongs to this thread.
    _thread: PhantomData<*mut ()>,
}

impl Kickable {
    /// Binds `vcpu` to the current thread.
    pub fn new(mut vcpu: VcpuFd) -> Self {
        RUN_PAGE.set(ptr::from_mut(vcpu.get_kvm_run()));
        Self { vcpu, _thread: PhantomData }
    }

    /// The vCPU.
    pub fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Forgets a kick that has been seen. Whoever kicked changed the state it wanted seen before; so read that state after this.
    pub fn clear(&mut self) {
        self.vcpu.set_kvm_immediate_exit(0);
        compiler_fence(Ordering::SeqCst);
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        RUN_PAGE.set(ptr::null_mut());
        compiler_fence(Ordering::SeqCst);
    }
}
