//! Containers: their states, what is stored of them, and what the agent is asked to make of their configuration.
//!
//! ```text
//!  Created ──start──▶ Running ──exit, or end of the VM──▶ Exited
//!     └──failed start, or end of the VM──────────────────────▲
//! ```
//!
//! Exited is terminal. The sandbox's driver ([`crate::sandbox`]) makes every transition and removes what a container leaves.

mod capabilities;
pub mod log;
mod process;
mod resources;
pub(crate) mod seccomp;
mod signal;
mod supported;
mod user_namespace;

use std::path::PathBuf;

use isopod_proto::{DiskId, ErrorKind, ObjectId};
use serde::{Deserialize, Serialize};

use crate::cri;

pub use process::{create_request, exec_process};
pub use resources::{explicit as explicit_resources, merged as merged_resources, to_guest as guest_resources};
pub use seccomp::{Filter, filter as seccomp_filter};
pub use signal::stop_signal;
pub use supported::{check, check_sandbox};
pub use user_namespace::{of_container as user_namespace, of_options as user_namespace_of_options};

/// Words that the kubelet and critest read in `ContainerStatus.reason`.
pub mod reason {
    /// Exit code 0.
    pub const COMPLETED: &str = "Completed";
    /// Another exit code, or the end of the VM.
    pub const ERROR: &str = "Error";
    /// Killed by the kernel for want of memory.
    pub const OOM_KILLED: &str = "OOMKilled";
    /// Could not be started.
    pub const START_ERROR: &str = "StartError";
    /// How it ended is not known.
    pub const UNKNOWN: &str = "Unknown";
}

/// Exit code of a container that could not be started.
pub const START_FAILED: i32 = 128;
/// Exit code of a container whose VM ended: killed, as by SIGKILL.
pub const KILLED: i32 = 137;
/// Exit code of a container of which nobody knows how it ended.
pub const UNKNOWN_EXIT: i32 = 255;

/// The state of a container. Times are nanoseconds since the epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Prepared in the guest; no process.
    Created,
    /// Its process runs.
    Running {
        /// Since when.
        started_at: i64,
    },
    /// Its process has ended, or never came to be.
    Exited(Exit),
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 if it never ran.
    pub started_at: i64,
    /// Not before `started_at`.
    pub finished_at: i64,
    /// 0 to 255; 128 + N for a signal N.
    pub exit_code: i32,
    /// One of [`reason`].
    pub reason: String,
    /// More, for people.
    pub message: String,
}

impl ContainerState {
    /// The state after the process ended with these facts.
    pub fn ended(&self, exit_code: i32, oom_killed: bool, finished_at: i64) -> Exit {
        let started_at = self.started_at();
        let reason = match exit_code {
            0 => reason::COMPLETED,
            _ if oom_killed => reason::OOM_KILLED,
            _ => reason::ERROR,
        };
        // The guest's clock may be a little off.
        let finished_at = finished_at.max(started_at);
        Exit { started_at, finished_at, exit_code, reason: reason.to_owned(), message: String::new() }
    }

    /// The state after the start failed, for what `message` says.
    pub fn start_failed(now: i64, message: String) -> Self {
        let reason = reason::START_ERROR.to_owned();
        Self::Exited(Exit { started_at: 0, finished_at: now, exit_code: START_FAILED, reason, message })
    }

    /// The state after the VM ended under the container; `oom_killed`: for want of memory.
    pub fn lost(&self, now: i64, oom_killed: bool, message: String) -> Exit {
        let started_at = self.started_at();
        let reason = if oom_killed { reason::OOM_KILLED } else { reason::ERROR }.to_owned();
        Exit { started_at, finished_at: now.max(started_at), exit_code: KILLED, reason, message }
    }

    /// The state after the process ended in a way that nobody knows.
    pub fn unknown(&self, now: i64, message: String) -> Exit {
        let started_at = self.started_at();
        let reason = reason::UNKNOWN.to_owned();
        Exit { started_at, finished_at: now.max(started_at), exit_code: UNKNOWN_EXIT, reason, message }
    }

    /// When it was started; 0 if it was not.
    pub fn started_at(&self) -> i64 {
        match self {
            Self::Created => 0,
            Self::Running { started_at } | Self::Exited(Exit { started_at, .. }) => *started_at,
        }
    }

    /// As CRI calls it.
    pub fn to_cri(&self) -> cri::ContainerState {
        match self {
            Self::Created => cri::ContainerState::ContainerCreated,
            Self::Running { .. } => cri::ContainerState::ContainerRunning,
            Self::Exited(_) => cri::ContainerState::ContainerExited,
        }
    }
}

/// The user a container runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Further groups.
    pub supplemental_groups: Vec<u32>,
}

/// What is stored of a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its id.
    #[serde(with = "crate::object_id")]
    pub id: ObjectId,
    /// Its sandbox's id.
    #[serde(with = "crate::object_id")]
    pub sandbox: ObjectId,
    /// The configuration it was created with, as CRI gave it.
    pub config: cri::ContainerConfig,
    /// `sha256:…`
    pub image_id: String,
    /// The number of the image's layers.
    pub layers: u32,
    /// When it was created: nanoseconds since the epoch.
    pub created_at: i64,
    /// Its state.
    pub state: ContainerState,
    /// Where its log goes, if it has one.
    pub log_path: Option<PathBuf>,
    /// Disks besides that of its image: those of images and devices that are its volumes.
    #[serde(default)]
    pub volume_disks: Vec<String>,
    /// Host paths of those of its volumes that are mirrors.
    #[serde(default)]
    pub mirrors: Vec<PathBuf>,
    /// The signal that asks it to stop, by its Linux number.
    pub stop_signal: u32,
    /// Whom it runs as, resolved in its image.
    pub user: Option<User>,
    /// `isopod.agent.v1.Process` of its first process: what exec'd processes take after.
    pub process: Vec<u8>,
}

impl ContainerRecord {
    /// The id its image's disk has in the pod.
    pub fn disk(&self) -> DiskId {
        disk_id(&self.image_id)
    }

    /// Every disk it uses in the pod.
    pub fn disks(&self) -> impl Iterator<Item = DiskId> {
        let volumes = self.volume_disks.iter().filter_map(|id| DiskId::parse(id).ok());
        std::iter::once(self.disk()).chain(volumes)
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub fn for_tests(id: ObjectId, sandbox: ObjectId) -> Self {
        Self {
            id,
            sandbox,
            config: cri::ContainerConfig::default(),
            image_id: "sha256:00".into(),
            layers: 1,
            created_at: 1,
            state: ContainerState::Created,
            log_path: None,
            volume_disks: Vec::new(),
            mirrors: Vec::new(),
            stop_signal: 15,
            user: None,
            process: Vec::new(),
        }
    }
}

/// The id of the disk of the image `image_id` (`sha256:…`).
pub fn disk_id(image_id: &str) -> DiskId {
    let digits: String = image_id.trim_start_matches("sha256:").chars().take(16).collect();
    DiskId::parse(&format!("img-{digits}")).expect("an image id is hexadecimal")
}

/// A container configuration that cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A value that is wrong.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which field, as CRI names it.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Something isopod cannot do.
    #[error("{field}: isopod does not support {what}")]
    Unsupported {
        /// Which field asks for it.
        field: &'static str,
        /// What it asks for.
        what: String,
    },
}

impl SpecError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_becomes_the_reason_the_kubelet_knows() {
        let running = ContainerState::Running { started_at: 5 };
        assert_eq!(running.ended(0, false, 9).reason, "Completed");
        assert_eq!(running.ended(0, true, 9).reason, "Completed");
        assert_eq!(running.ended(137, true, 9).reason, "OOMKilled");
        assert_eq!(running.ended(137, false, 9).reason, "Error");
        assert_eq!(running.ended(1, false, 9).exit_code, 1);
    }

    #[test]
    fn a_container_whose_vm_ended_was_killed_and_has_not_completed() {
        let exit = ContainerState::Running { started_at: 5 }.lost(9, false, "the guest crashed".into());
        assert_eq!((exit.exit_code, exit.reason.as_str(), exit.started_at), (137, "Error", 5));
    }

    #[test]
    fn an_end_that_nobody_knows_is_neither_success_nor_a_signal() {
        let exit = ContainerState::Running { started_at: 5 }.unknown(9, "no process x".into());
        assert_eq!((exit.exit_code, exit.reason.as_str(), exit.message.as_str()), (255, "Unknown", "no process x"));
    }

    #[test]
    fn no_container_finishes_before_it_started() {
        assert_eq!(ContainerState::Running { started_at: 5 }.ended(0, false, 3).finished_at, 5);
    }

    #[test]
    fn a_disk_is_named_after_its_image() {
        let id = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert_eq!(disk_id(&id).as_str(), "img-0123456789abcdef");
    }
}
