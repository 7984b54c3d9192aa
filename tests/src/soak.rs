//! What runs for minutes in `make soak`, and for a round in the end-to-end tests.

pub mod log;
pub mod many;
mod pod_life;
pub mod pods;
pub mod restart;
