//! Sandboxes: one task each ([`driver`]) owns all that changes of a sandbox, its VM and its containers.
//!
//! ```text
//!  Starting ──the agent is configured──▶ Ready ──stop, or end of the VM──▶ NotReady ──remove──▶ (forgotten)
//!      └──failure, or a daemon that ended meanwhile──▶ (forgotten, everything undone)
//! ```
//!
//! Starting is never shown to a client. What a sandbox holds on the host (directory, scratch disk, cgroup, tap, address,
//! VMM process) is found from its record alone, and released in one place: [`resources::Resources::release`], called at a
//! failed start, at a stop, and for what an earlier daemon left.

pub mod admission;
mod adoption;
pub mod attach;
mod beginning;
pub mod bring_up;
pub mod command;
pub mod driver;
pub mod files;
mod resize;
pub mod resources;
pub mod scratch;
pub mod size;
pub mod users;

mod cpu_sets;
mod create;
mod empty_dirs;
mod ending;
pub mod exec;
mod image_disks;
mod mirrors;
mod monitor;
mod operations;
pub mod update;
mod volumes;

use std::path::PathBuf;

use isopod_proto::{ErrorKind, ObjectId};
use serde::{Deserialize, Serialize};

use crate::cri;
use crate::network::KnownPod;
use crate::network::pod::PodNetwork;
use crate::vmm::VmIdentity;

/// The state of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SandboxPhase {
    /// Being brought up; not shown to clients.
    Starting,
    /// Its guest runs.
    Ready,
    /// Its guest has ended.
    NotReady,
}

impl SandboxPhase {
    /// As CRI calls it.
    pub fn to_cri(self) -> cri::PodSandboxState {
        match self {
            Self::Ready => cri::PodSandboxState::SandboxReady,
            Self::Starting | Self::NotReady => cri::PodSandboxState::SandboxNotready,
        }
    }
}

/// What is stored of a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Its id.
    #[serde(with = "crate::object_id")]
    pub id: ObjectId,
    /// The configuration it was created with, as CRI gave it.
    pub config: cri::PodSandboxConfig,
    /// The handler asked for; empty is the default one.
    pub runtime_handler: String,
    /// When it was created: nanoseconds since the epoch.
    pub created_at: i64,
    /// Its state.
    pub phase: SandboxPhase,
    /// Its VMM process, once there is one.
    pub vm: Option<VmIdentity>,
    /// Its network, while it has one.
    pub network: Option<PodNetwork>,
    /// Its cgroup's directory, once made.
    pub cgroup: Option<PathBuf>,
    /// Its file server, once something was shared with it.
    #[serde(default)]
    pub file_server: Option<crate::volume::server::FileServerRecord>,
    /// How large its VM was made; a VM does not grow.
    #[serde(default)]
    pub size: Option<size::Size>,
    /// The user that its VMM is; a VMM of an earlier version is root.
    #[serde(default)]
    pub uid: Option<u32>,
}

impl SandboxRecord {
    /// What tells this sandbox from all others of the kubelet.
    pub fn key(&self) -> SandboxKey {
        SandboxKey::of(&self.config)
    }

    /// The containers' host name: the pod's, or the node's where it has none.
    pub fn hostname(&self) -> String {
        if !self.config.hostname.is_empty() {
            return self.config.hostname.clone();
        }
        let uname = rustix::system::uname();
        uname.nodename().to_string_lossy().into_owned()
    }

    /// What the network is to know of it.
    pub fn known_pod(&self) -> KnownPod {
        KnownPod { sandbox: self.id.clone(), config: self.config.clone(), network: self.network.clone() }
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub fn for_tests(id: ObjectId) -> Self {
        Self {
            id,
            config: cri::PodSandboxConfig::default(),
            runtime_handler: String::new(),
            created_at: 1,
            phase: SandboxPhase::Ready,
            vm: None,
            network: None,
            cgroup: None,
            file_server: None,
            size: None,
            uid: None,
        }
    }
}

/// Name, namespace, uid and attempt: two sandboxes never share them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SandboxKey(String, String, String, u32);

impl SandboxKey {
    /// The key in a sandbox's configuration.
    pub fn of(config: &cri::PodSandboxConfig) -> Self {
        let metadata = config.metadata.clone().unwrap_or_default();
        Self(metadata.name, metadata.namespace, metadata.uid, metadata.attempt)
    }
}

impl std::fmt::Display for SandboxKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}_{}_{}_{}", self.0, self.1, self.2, self.3)
    }
}

/// An operation on a sandbox or one of its containers failed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The configuration.
    #[error("the configuration cannot be run")]
    Spec(#[source] crate::container::SpecError),
    /// The state does not allow it.
    #[error("{subject}: {denial}")]
    Denied {
        /// Whom it was asked of.
        subject: String,
        /// Why not.
        denial: admission::Denial,
    },
    /// There is one already.
    #[error("failed to reserve {what} name {name:?}: name {name:?} is reserved for {owner:?}")]
    Reserved {
        /// Sandbox or container.
        what: &'static str,
        /// The name.
        name: String,
        /// Who has it.
        owner: ObjectId,
    },
    /// There is no such thing.
    #[error("{what} {id:?} does not exist")]
    NotFound {
        /// Sandbox, container or image.
        what: &'static str,
        /// As it was asked for.
        id: String,
    },
    /// The sandbox cannot be brought up.
    #[error("cannot start the sandbox")]
    BringUp(#[source] bring_up::BringUpError),
    /// The guest.
    #[error("{doing}")]
    Guest {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        #[source]
        source: crate::guest::GuestError,
    },
    /// The VMM.
    #[error("{doing}")]
    Vmm {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        #[source]
        source: crate::vmm::VmmError,
    },
    /// CPU sets.
    #[error("the pod cannot have these CPUs and memory nodes of the host")]
    CpuSets(#[source] crate::cgroup::CgroupError),
    /// A host path.
    #[error("cannot share a host path with the pod")]
    HostPath(#[source] crate::volume::host::HostError),
    /// The file server.
    #[error("cannot share files with the pod")]
    Files(#[source] crate::volume::server::FileServerError),
    /// An emptyDir volume.
    #[error("cannot give an emptyDir volume to the pod")]
    EmptyDir(#[source] crate::volume::empty_dir::EmptyDirError),
    /// A device.
    #[error("cannot give a device to the pod")]
    Device(#[source] crate::volume::device::DeviceError),
    /// The image store.
    #[error("cannot read image {image:?}")]
    Image {
        /// Which.
        image: String,
        /// Why not.
        #[source]
        source: isopod_image_store::StoreError,
    },
    /// The database.
    #[error("cannot keep the state")]
    State(#[from] crate::store::StateError),
    /// The log.
    #[error("cannot log")]
    Log(#[from] crate::container::log::LogError),
    /// Something of the host is still there.
    #[error("cannot release what the sandbox holds on the host: {problems}")]
    Release {
        /// What failed.
        problems: String,
    },
    /// It took too long.
    #[error("{what} did not happen within {seconds} s")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long.
        seconds: u64,
    },
    /// The VM ended meanwhile.
    #[error("the sandbox's VM ended while {doing}")]
    VmEnded {
        /// At what.
        doing: &'static str,
    },
    /// It needs a larger VM.
    #[error("{field}: {wanted} is more than this sandbox's can grow to, {most}")]
    BeyondVm {
        /// Which limit, as CRI names it.
        field: &'static str,
        /// What was asked for.
        wanted: String,
        /// What there can be.
        most: String,
    },
    /// A client that is attached does not read.
    #[error("detached, as the client was more than {limit} bytes behind the container's output")]
    Detached {
        /// How far it may fall behind.
        limit: usize,
    },
    /// The same error, for several who asked for the same.
    #[error(transparent)]
    Shared(std::sync::Arc<SandboxError>),
    /// The driver or a thread is gone.
    #[error("the sandbox's driver has ended")]
    Ended,
}

impl SandboxError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Spec(error) => error.kind(),
            Self::Denied { .. } | Self::BeyondVm { .. } => ErrorKind::FailedPrecondition,
            Self::Reserved { .. } => ErrorKind::AlreadyExists,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::BringUp(error) => error.kind(),
            Self::Guest { source, .. } => source.kind(),
            Self::Vmm { source, .. } => source.kind(),
            Self::Image { source, .. } => source.kind(),
            Self::Device(error) => error.kind(),
            Self::CpuSets(error) => error.kind(),
            Self::EmptyDir(error) => error.kind(),
            Self::HostPath(error) => error.kind(),
            Self::Files(error) => error.kind(),
            Self::State(error) => error.kind(),
            Self::Log(error) => error.kind(),
            Self::Release { .. } => ErrorKind::Internal,
            Self::Late { .. } => ErrorKind::DeadlineExceeded,
            Self::Detached { .. } => ErrorKind::ResourceExhausted,
            Self::Shared(error) => error.kind(),
            Self::VmEnded { .. } | Self::Ended => ErrorKind::Unavailable,
        }
    }
}

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    i64::try_from(time::OffsetDateTime::now_utc().unix_timestamp_nanos()).expect("the year is below 2262")
}
