//! What the tests share: tars, images, and a registry that misbehaves as told.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its part; unwrap is how a test fails")]

pub mod layers;
pub mod power;
pub mod registry;
pub mod world;

use std::io::Write;
use std::process::Command;

use isopod_image_store::Verity;
use sha2::Digest as _;

/// A file to put into a tar.
pub enum Item<'a> {
    Dir(&'a str),
    File(&'a str, &'a [u8]),
    Symlink(&'a str, &'a str),
    Link(&'a str, &'a str),
}

/// The tar of `items`, whose names are written as they are, however wrong.
pub fn tar(items: &[Item<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for item in items {
        let (kind, name, link, data, mode) = match item {
            Item::Dir(name) => (tar::EntryType::Directory, name, "", &b""[..], 0o755),
            Item::File(name, data) => (tar::EntryType::Regular, name, "", *data, 0o644),
            Item::Symlink(name, target) => (tar::EntryType::Symlink, name, *target, &b""[..], 0o777),
            Item::Link(name, target) => (tar::EntryType::Link, name, *target, &b""[..], 0o644),
        };
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(data.len() as u64);
        header.set_cksum();
        append(&mut bytes, &header, data);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

/// Adds an entry to a tar that has no end yet.
pub fn append(tar: &mut Vec<u8>, header: &tar::Header, data: &[u8]) {
    tar.extend_from_slice(header.as_bytes());
    tar.extend_from_slice(data);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Bytes that do not compress.
pub fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    (0..length)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56) as u8
        })
        .collect()
}

/// Holds a disk and the hash tree behind its data against the root hash, as the kernel's documentation of dm-verity has it.
pub fn verify(disk: &[u8], verity: Verity) {
    let (data, tree) = disk.split_at(verity.data_blocks as usize * 4096);
    let mut levels: Vec<Vec<u8>> = Vec::new();
    let mut below = data.to_vec();
    while below.len() > 4096 {
        let mut level: Vec<u8> = below.chunks(4096).flat_map(sha2::Sha256::digest).collect();
        level.resize(level.len().next_multiple_of(4096), 0);
        levels.push(level.clone());
        below = level;
    }
    assert!(
        levels.into_iter().rev().flatten().eq(tree.iter().copied()),
        "the tree is as long and has the hashes it must"
    );
    assert_eq!(sha2::Sha256::digest(&below)[..], verity.root_hash);
}

/// Whether `program` is there. Under CI it must be.
pub fn have(program: &str) -> bool {
    let there = Command::new("which").arg(program).output().is_ok_and(|output| output.status.success());
    skip_unless(there, &format!("{program} is not installed"))
}

/// Whether this runs as root. Under CI it must.
pub fn root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    skip_unless(id.stdout.trim_ascii() == b"0", "not run as root")
}

fn skip_unless(there: bool, why: &str) -> bool {
    if !there {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "under CI=true nothing may be skipped: {why}");
        println!("skipped: {why}");
    }
    there
}

/// Runs a program that must succeed, and gives its output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}
