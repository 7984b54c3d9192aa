//! What the store knows of an image, as its users see it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;

use crate::digest::ImageId;

/// A pulled image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// `sha256:<digest of the configuration>`.
    pub id: ImageId,
    /// Names with tags, in full (`docker.io/library/busybox:latest`), sorted. Empty for an image pulled by digest.
    pub repo_tags: Vec<String>,
    /// Names with the digests of the manifests or indexes they were pulled by, sorted.
    pub repo_digests: Vec<String>,
    /// Bytes its layers and its metadata take in the store; above 0. Layers are shared between images, so sizes do not add up.
    pub size: u64,
    /// How containers are to be run from it.
    pub config: ImageConfig,
    /// Number of layers.
    pub layers: u32,
}

/// The `config` object of an image configuration (OCI image-spec, config.md "Properties"). The values are as the image's
/// author wrote them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// `user`, `uid`, `user:group`, `uid:gid`, …; empty: none is set.
    pub user: String,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// The first words of the command line.
    pub entrypoint: Vec<String>,
    /// The further words of the command line.
    pub cmd: Vec<String>,
    /// Empty: none is set.
    pub working_dir: String,
    /// `SIGTERM`, `15`, …; empty: none is set.
    pub stop_signal: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Paths at which the image wants volumes.
    pub volumes: BTreeSet<String>,
    /// `port`, `port/tcp`, `port/udp`.
    pub exposed_ports: BTreeSet<String>,
}

/// An image as one disk, which is one EROFS file system: what its layers show together.
#[derive(Debug)]
pub struct ImageDisk {
    /// The disk's contents, one after the other: metadata, and each layer's file, bottom first. Offsets and lengths are
    /// multiples of 512 KiB.
    pub segments: Vec<DiskSegment>,
}

/// A part of a file that is a part of a disk. The file is open read-only and stays usable when the image is removed.
#[derive(Debug)]
pub struct DiskSegment {
    /// The file.
    pub file: File,
    /// Where in the file the segment starts, in bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// What the store takes on its file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The store's root directory.
    pub mountpoint: PathBuf,
    /// Bytes allocated.
    pub used_bytes: u64,
    /// Files and directories.
    pub inodes_used: u64,
    /// When it was measured: nanoseconds since the epoch.
    pub timestamp_nanos: i64,
}
