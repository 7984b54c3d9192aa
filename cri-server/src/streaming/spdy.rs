//! SPDY/3.1 as the kubelet and crictl speak it: frames, compressed headers, and the connection made of them.

mod connection;
pub(crate) mod frame;
pub(crate) mod headers;

pub use connection::{Stream, serve};

#[cfg(test)]
pub use client::Client;
#[cfg(test)]
mod client;
