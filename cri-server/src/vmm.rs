//! A sandbox's VMM process: starting it, finding it again, driving it, and knowing how it ended.
//!
//! It is started with every descriptor it needs, in a process group of its own so that no signal for the daemon reaches it,
//! and goes on when the daemon ends. A later daemon knows it by pid and start time and watches it by pidfd. In its
//! directory are its two sockets, its exit record, and what it printed:
//!
//! | file | what |
//! |---|---|
//! | `control.sock` | the control protocol (`proto/vmm.proto`) |
//! | `vsock.sock` | connections to the guest |
//! | `exit` | a length-prefixed `VmExit`, written at its end |
//! | `vmm.log` | its standard output and error |

mod control;
mod process;
pub(crate) mod stat;
mod threads;

use std::io;
use std::path::PathBuf;

use isopod_proto::ErrorKind;
use serde::{Deserialize, Serialize};

pub(crate) use control::exchange;
pub use control::{
    DiskContents, DiskPart, VmCapacity, add_disk, add_file_system, capacity, console, disks, remove_disk,
    resize_memory, stop,
};
pub(crate) use process::start_time;
pub use process::{BootDisk, Configuration, Vm, VmSpec};
pub use threads::threads;

/// Name of the control socket in a VM's directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the vsock socket in a VM's directory.
pub const VSOCK_SOCKET: &str = "vsock.sock";

/// What tells a VMM process from a later one with the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmIdentity {
    /// Process id.
    pub pid: i32,
    /// Field 22 of /proc/pid/stat: clock ticks since the machine started.
    pub start_time: u64,
}

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEnd {
    /// Why, in words.
    pub message: String,
    /// The end of what the guest wrote to its console.
    pub console: String,
}

/// The VMM cannot be started, found or driven.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A file it needs.
    #[error("cannot {doing} {path}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process does not start.
    #[error("cannot start the VMM {binary}")]
    Spawn {
        /// Its program.
        binary: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A system call on the process failed.
    #[error("cannot {doing} VMM process {pid}")]
    Process {
        /// What was tried.
        doing: &'static str,
        /// Which process.
        pid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process is not there any more.
    #[error("VMM process {pid} is gone")]
    Gone {
        /// Which.
        pid: i32,
    },
    /// The control socket fails.
    #[error("cannot {doing} through the VMM's control socket {path}")]
    Control {
        /// What was asked.
        doing: &'static str,
        /// Which socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM refused.
    #[error("the VMM cannot {doing}: {message}")]
    Refused {
        /// What was asked.
        doing: &'static str,
        /// The VMM's kind of error.
        kind: ErrorKind,
        /// The VMM's words.
        message: String,
    },
    /// It ended while it was needed.
    #[error("the VMM ended: {message}{}", shown(console))]
    Ended {
        /// Why.
        message: String,
        /// The end of the console's output.
        console: String,
    },
    /// The host is not what it has to be.
    #[error("{problem}")]
    Host {
        /// In which way.
        problem: String,
    },
}

impl VmmError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { kind, .. } => *kind,
            Self::Gone { .. } | Self::Control { .. } | Self::Ended { .. } => ErrorKind::Unavailable,
            Self::Host { .. } => ErrorKind::FailedPrecondition,
            Self::File { .. } | Self::Spawn { .. } | Self::Process { .. } => ErrorKind::Internal,
        }
    }
}

/// The last lines of a console, as an addition to a message.
pub(crate) fn shown(console: &str) -> String {
    if console.is_empty() { String::new() } else { format!("; console:\n{console}") }
}

/// The end of a console's bytes, fit to be read: at most `lines` lines, without control characters.
pub fn console_tail(bytes: &[u8], lines: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let printable = |character: &char| *character == '\n' || *character == '\t' || !character.is_control();
    let clean: String = text.chars().filter(printable).collect();
    let all: Vec<&str> = clean.lines().filter(|line| !line.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_tail_is_its_last_lines_without_control_characters() {
        let console = b"one\r\n\x1b[1mtwo\x07\r\n\r\nthree\xff\r\n";
        assert_eq!(console_tail(console, 2), "[1mtwo\nthree\u{fffd}");
        assert_eq!(console_tail(b"", 5), "");
    }
}
