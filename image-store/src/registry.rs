//! The registry's side of a pull: the OCI distribution API over HTTP.
//!
//! An own small client, as the crates there are keep credentials between pulls, read manifests without a bound and do not
//! resume. Credentials live in one [`Registry`], which lives as long as one pull. Those that name a server are for that one
//! alone; others are sent to the hosts configured for the image's registry that ask for them, as containerd does. Never to
//! where a redirect leads, but to the token service that the host names; and a host that does not accept them is never asked
//! again without.

pub(crate) mod challenge;
mod client;
mod error;
pub(crate) mod hosts;
mod request;
mod retry;
mod server;
mod token;

pub(crate) use client::HttpClients;
pub use error::RegistryError;
pub(crate) use request::{Capability, FetchError, Registry};
