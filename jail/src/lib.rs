//! What a process does to itself so that whoever takes it over from inside gains nothing: the parts of a jail that the VMM
//! and the file server share. Which parts, in which order, and what is allowed is theirs to say (`vmm/src/jail.rs`,
//! `file-server/src/jail.rs`).
//!
//! Everything here acts on the calling thread and on those it starts later, so a jail is made while there is one thread.

#![forbid(unsafe_code)]

mod landlocked;
mod privileges;
mod root;
pub mod seccomp;

use std::io;

pub use landlocked::{Landlocked, allow_below, allow_nothing};
pub use privileges::{become_user, bound_capabilities, keep_capabilities, limit};
pub use root::{enter_empty_root, leave_namespaces, new_filesystem};

/// A step of making a jail that failed. A process that cannot be jailed must not go on.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}")]
pub struct JailError {
    /// What was tried.
    pub doing: &'static str,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl JailError {
    /// What failed, given what was tried.
    pub fn of<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self { doing, source: source.into() }
    }
}
