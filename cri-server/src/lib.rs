//! The isopod daemon: it serves the Kubernetes Container Runtime Interface and runs every pod in a microVM.
//!
//! [`grpc`] is the edge towards the kubelet.

#![forbid(unsafe_code)]

pub mod cgroup;
pub mod check;
pub mod config;
pub mod cri;
pub mod grpc;
pub mod log;
mod tools;
