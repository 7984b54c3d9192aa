//! The agent's container code, run natively: an agent in fresh namespaces on Unix sockets, and real containers from a busybox.
//!
//! Each test is named `root_*` and needs root; without it, it prints that it is skipped, and fails under CI=true.
#![allow(clippy::unwrap_used, reason = "clippy does not see that these are tests")]

#[path = "root/fixture.rs"]
mod fixture;
#[path = "root/isolation.rs"]
mod isolation;
#[path = "root/lifecycle.rs"]
mod lifecycle;
#[path = "root/mirrors.rs"]
mod mirrors;
#[path = "root/streams.rs"]
mod streams;
