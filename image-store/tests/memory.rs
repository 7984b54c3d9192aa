//! The most memory that a layer takes while it is made, and an image while its layers are merged, whatever they hold.
//!
//! Each case runs in a process of its own, which is this program again, and is held against the bound that `SPECIFICATION.md` promises.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use isopod_image_store::{Limits, convert_blob, merge_layers};
use support::layers::pax_record;
use support::{append, noise};

const THIS: &str = "whatever_a_layer_holds_it_takes_bounded_memory";
/// Bytes that are taken whatever the layer is. The window of a zstd frame comes on top, of 128 MiB at most.
const FIXED: u64 = 24 << 20;
/// And for each entry, and each directory that is only implied, besides its names, targets and attributes, of which there are two.
const ENTRY: u64 = 600;
const COPIES: u64 = 2;

/// A layer's tar, written piece by piece.
struct Layer {
    file: std::io::BufWriter<std::fs::File>,
    entries: u64,
    /// Of names, targets and attributes.
    metadata: u64,
}

impl Layer {
    fn new(path: &Path) -> Self {
        Self { file: std::io::BufWriter::new(std::fs::File::create(path).unwrap()), entries: 0, metadata: 0 }
    }

    /// Adds an entry, with the long name and the attributes that it has.
    fn add(&mut self, kind: tar::EntryType, name: &str, target: &str, data: &[u8], attributes: &[(&str, &[u8])]) {
        let mut bytes = Vec::new();
        let mut records = pax_record(b"path", name.as_bytes());
        if !target.is_empty() {
            records.extend(pax_record(b"linkpath", target.as_bytes()));
        }
        for (key, value) in attributes {
            records.extend(pax_record(format!("SCHILY.xattr.{key}").as_bytes(), value));
        }
        let header = |kind, size: usize| {
            let mut header = tar::Header::new_ustar();
            header.as_mut_bytes()[..1].copy_from_slice(b"x");
            header.set_entry_type(kind);
            header.set_mode(0o755);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(1);
            header.set_size(size as u64);
            header.set_cksum();
            header
        };
        append(&mut bytes, &header(tar::EntryType::XHeader, records.len()), &records);
        append(&mut bytes, &header(kind, data.len()), data);
        self.file.write_all(&bytes).unwrap();
        self.entries += 1;
        let attributes: usize = attributes.iter().map(|(key, value)| key.len() + value.len()).sum();
        self.metadata += (name.len() + target.len() + attributes) as u64;
    }

    /// The bound of what making it takes.
    fn end(mut self) -> u64 {
        self.file.write_all(&[0; 1024]).unwrap();
        self.file.flush().unwrap();
        FIXED + ENTRY * self.entries + COPIES * self.metadata
    }
}

/// Writes the layer of a case, and gives its bound.
fn write(case: &str, path: &Path) -> u64 {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let mut layer = Layer::new(path);
    match case {
        "one large file" => layer.add(Regular, "large", "", &noise(200 << 20, 1), &[]),
        "files in one directory" => (0..60_000).for_each(|n| layer.add(Regular, &format!("d/{n}"), "", b"", &[])),
        "directories" => (0..60_000).for_each(|n| layer.add(Directory, &format!("{}/{n}", n % 1000), "", b"", &[])),
        "directories that are only implied" => {
            (0..30_000).for_each(|n| layer.add(Regular, &format!("{n}/a/b/c"), "", b"", &[]));
            layer.entries *= 4;
        }
        "long names" => (0..30_000).for_each(|n| layer.add(Regular, &format!("{n:0>250}"), "", b"", &[])),
        "links" => {
            layer.add(Regular, "file", "", b"x", &[]);
            (0..60_000).for_each(|n| layer.add(Link, &format!("d/{n}"), "file", b"", &[]));
        }
        "symbolic links" => {
            let target = "t".repeat(1000);
            (0..30_000).for_each(|n| layer.add(Symlink, &format!("{n}"), &target, b"", &[]));
        }
        "attributes" => {
            let value = [1; 900];
            (0..30_000).for_each(|n| layer.add(Regular, &format!("{n}"), "", b"", &[("user.a", &value)]));
        }
        "one name again and again" => (0..60_000).for_each(|_| layer.add(Regular, "file", "", b"x", &[])),
        _ => unreachable!("there is no case {case}"),
    }
    layer.end()
}

const CASES: [&str; 9] = [
    "one large file",
    "files in one directory",
    "directories",
    "directories that are only implied",
    "long names",
    "links",
    "symbolic links",
    "attributes",
    "one name again and again",
];

/// The most memory this process has had.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn whatever_a_layer_holds_it_takes_bounded_memory() {
    if let Ok(layer) = std::env::var("MEMORY_LAYER") {
        let layer = PathBuf::from(layer);
        let converted = layer.with_extension("erofs");
        convert_blob(std::fs::File::open(&layer).unwrap(), &converted, &Limits::default()).unwrap();
        println!("peak of making: {}", peak());
        merge_layers(&[converted], &layer.with_extension("merged"), &Limits::default()).unwrap();
        println!("peak of merging: {}", peak());
        return;
    }
    let work = tempfile::TempDir::new().unwrap();
    for case in CASES {
        let layer = work.path().join("layer");
        let bound = write(case, &layer);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", THIS, "--nocapture"])
            .env("MEMORY_LAYER", &layer)
            .output()
            .unwrap();
        let output = String::from_utf8(output.stdout).unwrap();
        let number = |what: &str| -> u64 {
            let rest = output.split_once(what).unwrap_or_else(|| panic!("{case}: {output}")).1;
            rest.lines().next().unwrap().trim().parse().unwrap()
        };
        let (made, merged) = (number("peak of making: "), number("peak of merging: "));
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        println!("{case}: {:.1} MiB, with merging {:.1} MiB, of {:.1} MiB", mib(made), mib(merged), mib(bound));
        assert!(merged <= bound, "{case}: {merged} bytes, which is above {bound}");
        for file in std::fs::read_dir(work.path()).unwrap() {
            std::fs::remove_file(file.unwrap().path()).unwrap();
        }
    }
}
