//! Opening KVM, and checking that it does what a VM needs.

use std::io;

use isopod_proto::ErrorKind;
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

/// What is needed of KVM, with the names an administrator can look up.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist: is the kvm_intel or kvm_amd module loaded, and virtualization on in the firmware?"
    )]
    Absent(#[source] io::Error),
    /// `/dev/kvm` is there but may not be opened.
    #[error("/dev/kvm cannot be opened by this user")]
    NotPermitted(#[source] io::Error),
    /// Another failure to open it.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] io::Error),
    /// A kernel of another time.
    #[error("/dev/kvm has API version {0}, not {KVM_API_VERSION}")]
    ApiVersion(i32),
    /// A capability is not there.
    #[error("KVM lacks {0}")]
    Lacks(&'static str),
    /// The processor that KVM shows has no long mode, or none of what Linux needs.
    #[error("KVM cannot run 64-bit Linux: its CPUID lacks {0}")]
    CannotRunLinux(&'static str),
    /// A call on it fails.
    #[error("KVM does not answer {0}")]
    Call(&'static str, #[source] io::Error),
}

impl KvmError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Absent(_) | Self::NotPermitted(_) | Self::Open(_) => ErrorKind::Unavailable,
            Self::ApiVersion(_) | Self::Lacks(_) | Self::CannotRunLinux(_) => ErrorKind::FailedPrecondition,
            Self::Call(..) => ErrorKind::Internal,
        }
    }
}

/// KVM, checked, with the CPUID it can give guests.
pub struct CheckedKvm {
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// `KVM_GET_SUPPORTED_CPUID`, with the TSC-deadline bit where the in-kernel APIC has that timer.
    pub cpuid: CpuId,
}

/// Opens `/dev/kvm` and checks it. Whether the host can really run Linux shows only when it does: a `/dev/kvm` without
/// hardware virtualization behind it passes here.
pub fn open() -> Result<CheckedKvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| {
        let error = io::Error::from(error);
        match error.kind() {
            io::ErrorKind::NotFound => KvmError::Absent(error),
            io::ErrorKind::PermissionDenied => KvmError::NotPermitted(error),
            _ => KvmError::Open(error),
        }
    })?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(KvmError::ApiVersion(version));
    }
    if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        return Err(KvmError::Lacks(name));
    }
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| KvmError::Call("KVM_GET_SUPPORTED_CPUID", error.into()))?;
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        crate::cpuid::offer_tsc_deadline(&mut cpuid);
    }
    crate::cpuid::lacks_for_linux(&cpuid).map_or(Ok(()), |feature| Err(KvmError::CannotRunLinux(feature)))?;
    Ok(CheckedKvm { kvm, cpuid })
}
