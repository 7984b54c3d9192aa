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
    /// Whether it was preloaded from a file that was there still at the last preload: no garbage collector is to remove it.
    pub pinned: bool,
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

/// An image as one disk: one EROFS file system, which shows what its layers are together, and dm-verity's hash tree of it.
#[derive(Debug)]
pub struct ImageDisk {
    /// The files that its parts are in. They are open read-only and stay usable when the image is removed.
    pub files: Vec<File>,
    /// The disk's contents, one after the other.
    pub segments: Vec<DiskSegment>,
    /// What it is verified with.
    pub verity: Verity,
}

/// A part of a file that is a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSegment {
    /// Which of the disk's files.
    pub file: usize,
    /// Where in the file the segment starts, in bytes; a multiple of 4096.
    pub offset: u64,
    /// Bytes; a multiple of 4096.
    pub length: u64,
}

/// What a disk is verified with by dm-verity: SHA-256 without salt, blocks of 4096 bytes, version 1, the hash tree right behind the
/// data, without a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verity {
    /// The hash of the tree's highest block.
    pub root_hash: [u8; 32],
    /// Blocks of data.
    pub data_blocks: u64,
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
