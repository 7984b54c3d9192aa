//! The registry's side of a pull: the OCI distribution API over HTTP.
//!
//! An own small client, as the crates there are keep credentials between pulls, read manifests without a bound and do not
//! resume. Credentials live in one [`Registry`], which lives as long as one pull. They are sent to the endpoints configured
//! for the image's registry and to the token service these name, never along a redirect to another host, and a registry
//! that does not accept them is never asked again without.

mod challenge;
mod client;
mod request;

pub(crate) use client::HttpClients;
pub(crate) use request::{FetchError, Registry};
