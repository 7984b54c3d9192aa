//! Entry points for the fuzzer (`fuzz/`): everything that gets bytes of a registry, an image or an archive.

use std::io::{Seek, Write};
use std::path::Path;

use bytes::Bytes;

use crate::auth::{AuthFields, Credentials};
use crate::config::Limits;
use crate::import::archive::Archive;
use crate::import::documents;
use crate::registry::{challenge, hosts};
use crate::{Digest, ImageName, manifest};

pub use crate::layer::fuzz::{damaged, tar, tree};

/// Limits that an input of the fuzzer can reach.
pub(crate) fn limits() -> Limits {
    Limits { max_layer_bytes: 4 << 20, max_entries: 10_000, max_metadata_bytes: 1 << 20, ..Limits::default() }
}

/// A blob, plain or compressed, in pieces of the sizes that its first bytes say.
pub fn blob(input: &[u8]) {
    let Some((sizes, mut rest)) = input.split_first_chunk::<4>() else { return };
    let mut pieces = Vec::new();
    for size in sizes {
        let (piece, later) = rest.split_at(rest.len().min((*size).into()));
        pieces.push(Bytes::copy_from_slice(piece));
        rest = later;
    }
    pieces.push(Bytes::copy_from_slice(rest));
    let limits = limits();
    if let Ok(length) = crate::layer::inflate_pieces(pieces, &limits) {
        assert!(length <= limits.max_layer_bytes);
    }
}

/// Manifests, indexes, configurations, and what an archive says of its images.
pub fn documents(input: &[u8]) {
    let _ = manifest::parse(input);
    let _ = manifest::parse_config(input);
    let _ = documents::layout(input);
    let _ = documents::saved(input);
}

/// Names of images and digests. What is accepted is read the same again.
pub fn reference(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(digest) = Digest::parse(text) {
        assert_eq!(digest.as_str(), text);
    }
    let Ok(name) = ImageName::parse(text) else { return };
    assert_eq!(ImageName::parse(&name.to_string()).expect("it is a name"), name);
    // Both become parts of URLs and paths.
    for part in [name.registry(), name.repository()] {
        assert!(!part.is_empty() && !part.split('/').any(|part| part == ".." || part.is_empty()), "{part:?}");
    }
}

/// `hosts.toml`.
pub fn hosts(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(parsed) = hosts::parse::parse(text, Path::new("/etc/containerd/certs.d/x/hosts.toml")) {
        assert!(!parsed.hosts.is_empty());
    }
}

/// What a registry asks for, and what CRI has to answer it with.
pub fn auth(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let _ = challenge::parse(text);
    let fields: Vec<&str> = text.split('\n').collect();
    let field = |index: usize| fields.get(index).copied().unwrap_or_default();
    let _ = Credentials::from_fields(AuthFields {
        username: field(0),
        password: field(1),
        auth: field(2),
        server_address: field(3),
        identity_token: field(4),
        registry_token: field(5),
    });
}

/// An archive of images, whose files are then all read.
pub fn archive(input: &[u8]) {
    thread_local! {
        static SPOOL: std::fs::File = spool().expect("a file in memory");
    }
    let mut file = SPOOL.with(|file| file.try_clone()).expect("a descriptor");
    file.set_len(0).and_then(|()| file.rewind()).expect("it is a file");
    let mut bytes = input.to_vec();
    crate::layer::fuzz::mend(&mut bytes);
    let Ok(archive) = Archive::read(&bytes[..], file, &limits()) else { return };
    for name in ["index.json", "manifest.json", "oci-layout", "blobs/sha256/a", "a", "../a"] {
        let Some(span) = archive.find(name) else { continue };
        let mut content = vec![0; span.length.min(1 << 20) as usize];
        let count = archive.read_at(span, 0, &mut content).expect("what was put aside is there");
        documents(&content[..count]);
    }
}

/// A file without a name, in memory.
pub(crate) fn spool() -> std::io::Result<std::fs::File> {
    let path = format!("/dev/shm/isopod-fuzz-{}-{:?}", std::process::id(), std::thread::current().id());
    let mut file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(path)?;
    file.flush()?;
    Ok(file)
}
