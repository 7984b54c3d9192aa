//! What a driver is asked, and what its own tasks tell it.

use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ObjectId;
use isopod_proto::agent::{StatsResponse, WaitProcessResponse};
use tokio::sync::oneshot;

use super::SandboxError;
use super::attach;
use super::bring_up::Up;
use super::exec::{self, Outcome};
use super::update::{ContainerUpdate, PodUpdate};
use crate::cri;
use crate::streaming::requests::Wanted;
use crate::vmm::VmEnd;

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T, SandboxError>>;

/// What an RPC handler asks of a driver.
pub enum Command {
    /// StopPodSandbox.
    Stop(Reply<()>),
    /// RemovePodSandbox; the driver ends if it succeeds.
    Remove(Reply<()>),
    /// CreateContainer.
    Create(Box<cri::ContainerConfig>, Reply<ObjectId>),
    /// StartContainer.
    Start(ObjectId, Reply<()>),
    /// StopContainer, with its grace.
    StopContainer(ObjectId, Duration, Reply<()>),
    /// RemoveContainer.
    RemoveContainer(ObjectId, Reply<()>),
    /// ReopenContainerLog.
    ReopenLog(ObjectId, Reply<()>),
    /// ExecSync: the command and its limit.
    Exec(ObjectId, Vec<String>, Option<Duration>, Reply<Outcome>),
    /// UpdateContainerResources.
    UpdateContainer(ObjectId, Box<ContainerUpdate>, Reply<()>),
    /// UpdatePodSandboxResources.
    UpdatePod(Box<PodUpdate>, Reply<()>),
    /// A command for a client that streams: its container, words and streams; to be run by whoever asks.
    OpenExec(ObjectId, Vec<String>, Wanted, Reply<(Up, exec::Command)>),
    /// A container's own process for a client that streams.
    OpenAttach(ObjectId, Wanted, Reply<attach::Target>),
    /// The running guest, for connections to its ports.
    OpenPorts(Reply<Up>),
    /// The guest's counters.
    Stats {
        /// Whether descriptors are to be counted.
        descriptors: bool,
        /// Where the answer goes.
        reply: Reply<StatsResponse>,
    },
}

impl Command {
    /// Nothing else of the sandbox matters once this is asked.
    pub fn ends_sandbox(&self) -> bool {
        matches!(self, Self::Stop(_) | Self::Remove(_))
    }
}

/// What the driver's own tasks tell it.
pub(super) enum Event {
    /// A container's process has ended; its log is complete.
    Exited(ObjectId, WaitProcessResponse),
    /// The agent does not know a container's process any more, for this reason.
    Lost(ObjectId, String),
    /// The grace of a stop is over.
    GraceOver(ObjectId),
    /// A killed container should have ended by now.
    KillOverdue(ObjectId),
    /// The VM has ended.
    VmEnded(Arc<VmEnd>),
}
