//! Process 1 of an isopod guest, and nothing but it: it makes the guest a pod, mounts images, runs containers, carries their
//! streams and tells how they ended.
//!
//! It trusts the daemon on the host and nothing a container can write. It has no configuration of its own: the daemon tells it
//! everything over vsock (`proto/agent.proto`). It never changes its own working directory, umask, environment or namespaces;
//! what has to is a [`stub`].
#![deny(unsafe_code)]
#![warn(missing_docs)]

mod agent;
mod beneath;
mod boot;
mod cgroup;
mod console;
mod container;
mod cpus;
mod device_access;
mod device_mapper;
mod devices;
mod disk;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod hello;
mod launch;
mod layout;
mod limits;
mod mirror;
mod netlink;
mod pod;
mod pod_init;
mod process;
mod reaper;
mod rpc;
mod run;
mod server;
mod shares;
mod stats;
mod stream;
pub mod stub;
mod sys;
mod sysctl;
mod user_namespace;
mod users;
mod volume;

pub use run::{run_in_guest, run_on_unix_sockets};
