//! The file system device (virtio 1.2, section 5.11), as a transport only.
//!
//! Each FUSE request of the guest is copied out of its memory and passed to the pod's file server over a Unix stream socket;
//! each reply is copied back. The server never sees guest memory, and nothing here knows what a request means but three
//! things of its header: its length, which must be that of the chain; its number, by which the reply finds it; and whether it
//! is one of the two kinds that have no reply.
//!
//! A server that ends, or says what is no reply to anything, costs the device: whatever is asked from then on is answered
//! with ENOTCONN. The VM goes on.

mod device;
mod link;
mod message;
mod worker;

pub use device::{Fs, FsError};
