//! What a store is configured with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// The configuration of an [`crate::ImageStore`].
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The directory that holds everything; made if it is not there. One store at a time may use it.
    pub root: PathBuf,
    /// How registries are reached.
    pub registries: RegistryConfig,
    /// What an image may at most be.
    pub limits: Limits,
    /// Layers of one pull that are fetched and converted at the same time; at least 1.
    pub max_layers_at_once_per_pull: usize,
    /// Layers of all pulls together that are; at least 1. Those above wait for their turn.
    pub max_layers_at_once: usize,
    /// A pull in which no byte arrives for this long fails.
    pub pull_progress_timeout: Duration,
    /// What is kept of pulls that are cut.
    pub resume: ResumeConfig,
}

impl StoreConfig {
    /// The default configuration for a store at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            registries: RegistryConfig::default(),
            limits: Limits::default(),
            max_layers_at_once_per_pull: 3,
            max_layers_at_once: 6,
            pull_progress_timeout: Duration::from_secs(300),
            resume: ResumeConfig::default(),
        }
    }
}

/// Which layers' compressed bytes are kept while they are pulled, so that a pull that was cut goes on where it was.
#[derive(Clone, Debug)]
pub struct ResumeConfig {
    /// Layers whose blob has fewer bytes are fetched anew.
    pub min_bytes: u64,
    /// Bytes on disk of all that no pull is at work on, together; the oldest goes first. A larger layer is not kept.
    pub max_bytes: u64,
    /// How long after its last byte what a pull has left is kept.
    pub max_age: Duration,
}

impl Default for ResumeConfig {
    fn default() -> Self {
        Self { min_bytes: 1 << 20, max_bytes: 16 << 30, max_age: Duration::from_secs(3600) }
    }
}

/// How registries are reached.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// For a registry's host as it stands in image names (such as `docker.io` or `localhost:5000`), the endpoints it is
    /// reached through, tried in this order. A host that is listed is reached through these alone: to fall back to the
    /// registry itself, list it last. A host that is in neither is reached at `https://HOST`.
    pub mirrors: BTreeMap<String, Vec<Endpoint>>,
    /// containerd's `certs.d`: for a host that is not among the mirrors, `HOST/hosts.toml` in it says how it is reached, or
    /// `_default/hosts.toml`. Read at each pull; it need not exist.
    pub certs_directory: Option<PathBuf>,
    /// How long a connection may take to come about.
    pub connect_timeout: Duration,
    /// How often a request is tried again after a lost connection, a 429 or a 5xx. For a layer the count starts anew
    /// whenever 64 KiB have arrived.
    pub retries: u32,
    /// The first pause before trying again; it doubles each time.
    pub backoff: Duration,
    /// The longest such pause, also where the registry asks for a longer one (Retry-After).
    pub max_backoff: Duration,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            mirrors: BTreeMap::new(),
            certs_directory: None,
            connect_timeout: Duration::from_secs(10),
            retries: 4,
            backoff: Duration::from_millis(250),
            max_backoff: Duration::from_secs(30),
        }
    }
}

/// Where a registry answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `https://HOST[:PORT][/PATH]`, or the same with `http` for a connection in plain text. The registry API is at
    /// `URL/v2/`. The credentials of a pull are sent to it, as the administrator's configuration vouches for it.
    pub url: String,
    /// A PEM file of certificate authorities to accept besides the system's.
    pub ca_file: Option<PathBuf>,
}

impl Endpoint {
    /// The endpoint at `url`, with the system's certificate authorities.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), ca_file: None }
    }
}

/// What an image may at most be. Whatever is above a limit is refused with an error that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a manifest or index, and of an image configuration.
    pub max_manifest_bytes: u64,
    /// Layers of an image. At most 127, as in Docker: each is a descriptor that a VMM is sent, together at most 253.
    pub max_layers: usize,
    /// Bytes of a layer's tar stream after decompression, and of the file data it describes (holes included).
    pub max_layer_bytes: u64,
    /// How many times as large as its compressed bytes a layer may be; the first 16 MiB are free.
    pub max_inflate_ratio: u64,
    /// Bytes of the files in an archive that is imported.
    pub max_archive_bytes: u64,
    /// Entries of a layer's tar, and files and directories in all layers of an image together.
    pub max_entries: u64,
    /// Bytes of a path, or of a link's target.
    pub max_path_bytes: usize,
    /// Components of a path.
    pub max_depth: usize,
    /// Bytes of one entry's extended attributes, names and values together. At most 64 KiB are ever accepted.
    pub max_xattr_bytes: usize,
    /// Bytes of all names, targets and extended attributes of a layer together, and of an image: they are kept in memory while it
    /// is made.
    pub max_metadata_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_manifest_bytes: 4 << 20,
            max_layers: 127,
            max_layer_bytes: 32 << 30,
            max_inflate_ratio: 500,
            max_archive_bytes: 128 << 30,
            max_entries: 2_000_000,
            max_path_bytes: 4096,
            max_depth: 256,
            max_xattr_bytes: 64 << 10,
            max_metadata_bytes: 256 << 20,
        }
    }
}
