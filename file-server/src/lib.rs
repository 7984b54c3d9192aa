//! `isopod-fs`: what a pod may see of the host's files, served as one FUSE file system.
//!
//! Two processes a pod. The **broker** ([`broker`]) has a mount namespace of its own and takes shares from the daemon; it
//! never sees a byte of the guest's. The **server** ([`jail`], [`session`]) is in the same mount namespace, whose root holds
//! nothing but the shares, in its own PID, network, IPC and UTS namespaces, with the few capabilities that file operations of
//! root need; it answers the guest's requests, which the VMM passes on unread.
//!
//! Invariants, each enough to keep a guest to its shares:
//!
//! * A request names a file by a number that an earlier answer gave, or by one name in such a directory. Names with a slash,
//!   `.` and `..` are refused, and no symbolic link is ever followed: links are the guest kernel's to follow.
//! * Nothing is outside: the root is an empty file system with the shares mounted in it.
//! * Without CAP_DAC_READ_SEARCH no file can be opened by its handle, without CAP_SYS_ADMIN nothing can be mounted.
//!
//! Only regular files and directories are ever opened: a device node, FIFO or socket of a share is the guest kernel's, which
//! makes of it one of its own. No device node can be made.
//!
//! Own code rather than fuse-backend-rs 0.14: its PassthroughFs knows one tree that never changes, while shares come and go
//! here, and what a guest holds open of one has to be let go with it; and it would bring in outdated nix, mio and vm-memory.

pub mod broker;
mod fuse;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod handles;
pub mod jail;
mod nodes;
mod operations;
pub mod server;
pub mod session;
mod sys;

pub use sys::{let_faults_kill, take_inherited_fd};
