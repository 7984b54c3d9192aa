//! End-to-end tests and benchmarks of isopod: what they share.

#![forbid(unsafe_code)]

pub mod fixture;
pub mod hostile;
pub mod kvm_trace;
pub mod microvm;
pub mod process_memory;
pub mod soak;
