//! The isopod daemon: it serves the Kubernetes Container Runtime Interface and runs every pod in a microVM.
//!
//! [`grpc`] is the edge towards the kubelet. [`runtime`] finds the sandbox a call is for; the sandbox's driver
//! ([`sandbox::driver`]) carries it out; lists and status calls read the [`index`]. [`vmm`] and [`guest`] are the edges
//! towards a sandbox's VMM process and the agent in its guest.
//!
//! Not here: anything that looks into an image or a guest's memory, and any container process on the host.

#![forbid(unsafe_code)]

pub mod cgroup;
pub mod check;
mod client;
pub mod cni;
pub mod config;
pub mod container;
pub mod context;
pub mod cpu_set;
pub mod cri;
pub mod daemon;
pub mod events;
pub mod ext4;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
pub mod grpc;
pub mod guest;
pub mod image_command;
pub mod images;
pub mod index;
pub mod leftovers;
pub mod network;
mod object_id;
mod oom;
pub mod runtime;
pub mod sandbox;
mod socket;
pub mod stop_all;
pub mod store;
pub mod streaming;
mod tools;
pub mod vmm;
pub mod volume;

/// A new id.
fn random_id() -> Result<isopod_proto::ObjectId, rustix::io::Errno> {
    let mut bytes = [0; 32];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(isopod_proto::ObjectId::from_random(bytes))
}
