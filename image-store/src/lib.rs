//! OCI images as read-only EROFS block images: registry client, conversion, content store.
//!
//! [`ImageStore::pull`] fetches an image; each of its layers becomes, as its bytes arrive, one EROFS file named by the
//! layer's diff id. The trees of all its layers are merged into one EROFS file system, whose metadata are a file of
//! the image's own, and whose files' data stay in the layers' files. [`ImageStore::disk`] gives an image as the segments of one disk.
//!
//! Invariants: nothing is unpacked to a directory tree and nothing is mounted; a file under its final name is complete,
//! verified and durable; names are the only roots, so a layer that no image has is removed; bytes of a registry are used only
//! after their digest was checked.
//!
//! Not here: pushing, building, signatures, other platforms than linux/amd64.

#![forbid(unsafe_code)]

mod auth;
mod config;
mod digest;
mod durable;
mod erofs;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod image;
mod import;
mod layer;
mod making;
mod manifest;
mod merge;
mod preload;
mod pull;
mod reference;
mod registry;
mod spool;
mod store;
mod verity;

pub use auth::{Auth, AuthError, AuthFields, Credentials};
pub use config::{Endpoint, Limits, RegistryConfig, ResumeConfig, StoreConfig};
pub use digest::{Digest, ImageId, InvalidDigest};
pub use durable::open_database;
pub use image::{DiskSegment, Image, ImageConfig, ImageDisk, Usage, Verity};
pub use import::{ImportError, Imported, Progress, open_archive};
pub use layer::{ConvertReport, LayerError, convert_blob};
pub use merge::{MergeError, Merged, merge_layers};
pub use preload::{PreloadError, Preloaded};
pub use pull::PullError;
pub use reference::{ImageName, ReferenceError};
pub use registry::RegistryError;
pub use store::{ImageStore, OpenError, StoreError};
