//! Wire types of isopod: what travels between the daemon, the VMM and the agent.
//!
//! Everything here is types and constants; nothing does I/O. The messages are generated from `proto/*.proto`, whose
//! comments are the specification of the protocols: [`agent`] (gRPC and streams over vsock), [`vmm`] (the control socket and
//! the configuration of one VMM process) and [`files`] (the control socket of a pod's file server).

mod error;
mod frame;
mod id;

pub use error::{ErrorKind, chain};
pub use frame::{FrameError, decode_frame, encode_frame};
pub use id::{DiskId, InvalidId, ObjectId};

/// The agent protocol: pods, containers, processes and their streams.
pub mod agent {
    #![allow(missing_docs, clippy::all, clippy::too_many_lines, reason = "generated code")]
    include!(concat!(env!("OUT_DIR"), "/isopod.agent.v1.rs"));
}

/// The VMM control protocol.
pub mod vmm {
    #![allow(missing_docs, clippy::all, clippy::too_many_lines, reason = "generated code")]
    include!(concat!(env!("OUT_DIR"), "/isopod.vmm.v1.rs"));
}

/// The file server's protocol.
pub mod files {
    #![allow(missing_docs, clippy::all, clippy::too_many_lines, reason = "generated code")]
    include!(concat!(env!("OUT_DIR"), "/isopod.files.v1.rs"));
}

/// Version of the agent protocol; daemon and agent must agree on it exactly.
pub const AGENT_PROTOCOL_VERSION: u32 = 1;

/// vsock port of the host to which the agent sends its [`agent::Hello`].
pub const HELLO_PORT: u32 = 1024;
/// vsock port of the guest on which the agent serves gRPC.
pub const AGENT_RPC_PORT: u32 = 1025;
/// vsock port of the guest on which the agent takes stream connections.
pub const AGENT_STREAM_PORT: u32 = 1026;

/// Most bytes a [`agent::Hello`] may have.
pub const MAX_HELLO: usize = 4096;
/// Most bytes a [`agent::StreamOpen`] or [`agent::StreamOpened`] may have.
pub const MAX_STREAM_HEADER: usize = 4096;
/// Most bytes of an output stream that may be on their way without an acknowledgement.
pub const STREAM_WINDOW: usize = 64 * 1024;
/// Most bytes a gRPC message of the agent protocol may have, in either direction.
pub const MAX_AGENT_MESSAGE: usize = 4 * 1024 * 1024;
/// Most bytes that the contents, names and link targets of a mirror may have together.
pub const MAX_MIRROR_BYTES: usize = 8 * 1024 * 1024;
/// Most entries a mirror may have, its root not counted.
pub const MAX_MIRROR_ENTRIES: usize = 4096;
/// Most directories on a path in a mirror, its root not counted.
pub const MAX_MIRROR_DEPTH: usize = 8;
/// Most bytes of an encoded mirror: what is in it, and what describes each entry.
pub const MAX_MIRROR_MESSAGE: usize = MAX_MIRROR_BYTES + (MAX_MIRROR_ENTRIES + 1) * 64;
/// Most bytes a message on the VMM's control socket may have.
pub const MAX_CONTROL_MESSAGE: usize = 256 * 1024;
/// Most bytes of file contents that one FUSE message carries, in either direction: max_write of FUSE_INIT, and 256 pages.
pub const MAX_FUSE_DATA: usize = 1 << 20;
/// Most bytes of a whole FUSE message: its data, headers, and names.
pub const MAX_FUSE_MESSAGE: usize = MAX_FUSE_DATA + 16 * 1024;
/// How much of the serial console's output the VMM keeps.
pub const CONSOLE_RING_BYTES: usize = 64 * 1024;
