//! Tars, of the input's bytes or of entries it describes, to EROFS images that can be read.

use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;

use arbitrary::{Arbitrary, Unstructured};
use tar::{EntryType, Header};

use super::convert::convert;
use crate::erofs::{Data, ErofsWriter, MergeLimits, Tree, read_tree};
use crate::fuzz::{limits, spool};

const BLOCK: usize = 512;

/// Gives each block that can be a header the checksum it should have: the fuzzer would not find it.
pub(crate) fn mend(tar: &mut [u8]) {
    let mut at = 0;
    while let Some(block) = tar.get_mut(at..at + BLOCK) {
        at += BLOCK;
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
        let data = header.entry_size().unwrap_or_default().min(1 << 30) as usize;
        at += data.next_multiple_of(BLOCK);
    }
}

/// A tar as it is. If the first byte is odd its checksums are mended.
pub fn tar(input: &[u8]) {
    let Some((flags, tar)) = input.split_first() else { return };
    let mut tar = tar.to_vec();
    if flags & 1 != 0 {
        mend(&mut tar);
    }
    convert_and_read(&tar);
}

/// An entry; names are made of few parts, so that they meet.
#[derive(Debug, Arbitrary)]
struct Entry {
    path: Vec<u8>,
    kind: u8,
    link: Vec<u8>,
    size: u16,
    mode: u16,
    owner: u32,
    time: u64,
    xattrs: Vec<(u8, u8, Vec<u8>)>,
}

/// A path of the parts that `bytes` choose.
fn path(bytes: &[u8]) -> Vec<u8> {
    let long = [b'n'; 255];
    let parts: [&[u8]; 14] = [
        b"a",
        b"b",
        b"c",
        b"d",
        b"usr",
        b"x",
        b".wh.a",
        b".wh.b",
        b".wh..wh..opq",
        b"..",
        b".",
        b"",
        &long,
        b"\xff\xfe",
    ];
    // The strange ones are rare.
    let part = |byte: &u8| parts[usize::from(if *byte < 200 { byte % 9 } else { byte % 14 })];
    bytes.iter().take(12).map(part).collect::<Vec<_>>().join(&b'/')
}

fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let digits = (1..).find(|digits| (rest + digits).to_string().len() == *digits).expect("a number has digits");
    out.extend(format!("{} ", rest + digits).as_bytes());
    out.extend(key);
    out.push(b'=');
    out.extend(value);
    out.push(b'\n');
}

impl Entry {
    fn append(&self, tar: &mut Vec<u8>) {
        let mut records = Vec::new();
        record(&mut records, b"path", &path(&self.path));
        record(&mut records, b"linkpath", &path(&self.link));
        for (prefix, name, value) in self.xattrs.iter().take(8) {
            let prefixes = ["user.", "trusted.overlay.", "security.", "system.posix_acl_", "odd."];
            let prefix = prefixes[usize::from(*prefix) % prefixes.len()];
            let key = format!("SCHILY.xattr.{prefix}{}", "x".repeat(usize::from(*name % 64)));
            record(&mut records, key.as_bytes(), value);
        }
        append(tar, EntryType::XHeader, &records, |_| {});
        let kinds = [
            EntryType::Regular,
            EntryType::Regular,
            EntryType::Directory,
            EntryType::Symlink,
            EntryType::Link,
            EntryType::Char,
            EntryType::Block,
            EntryType::Fifo,
            EntryType::Continuous,
        ];
        let kind = kinds[usize::from(self.kind) % kinds.len()];
        let data = if kind.is_file() { vec![self.kind; self.size.into()] } else { Vec::new() };
        append(tar, kind, &data, |header| {
            header.set_mode(self.mode.into());
            header.set_uid(self.owner.into());
            header.set_gid((self.owner >> 8).into());
            header.set_mtime(self.time);
            // They are fields of every header that `new_gnu` makes.
            let _ = header.set_device_major(self.owner % 5000);
            let _ = header.set_device_minor(self.owner >> 8);
        });
    }
}

fn append(tar: &mut Vec<u8>, kind: EntryType, data: &[u8], set: impl FnOnce(&mut Header)) {
    let mut header = Header::new_gnu();
    set(&mut header);
    header.set_entry_type(kind);
    header.set_size(data.len() as u64);
    header.set_cksum();
    tar.extend(header.as_bytes());
    tar.extend(data);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
}

/// A tar of entries that the input describes.
pub fn tree(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let mut tar = Vec::new();
    while !input.is_empty() && tar.len() < 1 << 20 {
        let Ok(entry) = Entry::arbitrary(&mut input) else { break };
        entry.append(&mut tar);
    }
    tar.resize(tar.len() + 2 * BLOCK, 0);
    convert_and_read(&tar);
}

/// Converts the tar. What comes out, if anything does, is read by another implementation to its last byte.
fn convert_and_read(tar: &[u8]) {
    thread_local! {
        static OUTPUT: std::fs::File = spool().expect("a file in memory");
    }
    let mut file = OUTPUT.with(|file| file.try_clone()).expect("a descriptor");
    file.set_len(0).and_then(|()| file.rewind()).expect("it is a file");
    let limits = limits();
    let Ok(made) = convert(tar, file, &limits, |_| Ok([7; 16])) else { return };
    assert!(made.size.is_multiple_of(4096) && made.entries <= limits.max_entries);
    let mut file = made.file;
    let mut image = Vec::new();
    file.rewind().expect("it is a file");
    file.read_to_end(&mut image).expect("it is readable");
    // What is behind its end is a hole.
    assert!(image.len() as u64 >= made.size);
    read(&image[..made.size as usize]);
    merge(&file);
}

/// Reads the image at `file` as a merge does, and puts it over itself.
fn merge(file: &std::fs::File) {
    let read = || read_tree(file, 2 * limits().max_entries);
    let (first, second) = (read().expect("what was written"), read().expect("what was written"));
    write_merged([first, second]);
}

fn write_merged(layers: [Tree; 2]) {
    thread_local! {
        static MERGED: std::fs::File = spool().expect("a file in memory");
    }
    let mut file = MERGED.with(|file| file.try_clone()).expect("a descriptor");
    file.set_len(0).and_then(|()| file.rewind()).expect("it is a file");
    let mut left = MergeLimits::new(limits().max_entries, limits().max_metadata_bytes);
    let mut tree = Tree::merged();
    for (layer, base) in layers.into_iter().zip([0, 1 << 10]) {
        if tree.merge(layer, base, &mut left).is_err() {
            return;
        }
    }
    let writer = ErofsWriter::new(file).expect("there is room");
    // A tree of a damaged image may have files beyond what a file system can have.
    let _ = writer.finish(&tree, [9; 16], Data::Behind(1 << 11));
}

/// An image with some bytes changed behind its superblock, as on a bad disk.
pub fn damaged(input: &[u8]) {
    thread_local! {
        static IMAGE: (std::fs::File, Vec<u8>) = image();
    }
    let (file, image) = IMAGE.with(|(file, image)| (file.try_clone().expect("a descriptor"), image.clone()));
    let changes = input.as_chunks::<4>().0.iter().take(64);
    let places =
        changes.map(|[low, high, old, new]| (4096 + usize::from(u16::from_le_bytes([*low, *high])), old ^ new));
    let places: Vec<_> = places.filter(|(place, _)| *place < image.len()).collect();
    for (place, change) in &places {
        file.write_all_at(&[image[*place] ^ change], *place as u64).expect("it is a file");
    }
    let read = || read_tree(&file, 2 * limits().max_entries);
    if let (Ok(first), Ok(second)) = (read(), read()) {
        write_merged([first, second]);
    }
    for (place, _) in &places {
        file.write_all_at(&image[*place..=*place], *place as u64).expect("it is a file");
    }
}

/// An image with something of each kind.
fn image() -> (std::fs::File, Vec<u8>) {
    let mut tar = Vec::new();
    for (number, kind) in (0..9).chain(0..9).enumerate() {
        let place = number as u8;
        let xattrs = vec![(place, place, vec![place; 5])];
        let (path, link) = (vec![4, place % 9], vec![4, 0]);
        Entry { path, kind, link, size: 5000, mode: 0o755, owner: 7, time: 8, xattrs }.append(&mut tar);
    }
    tar.resize(tar.len() + 2 * BLOCK, 0);
    let file = spool().expect("a file in memory");
    let mut file = convert(&tar[..], file, &limits(), |_| Ok([7; 16])).expect("a sound tar").file;
    let mut image = Vec::new();
    file.rewind().expect("it is a file");
    file.read_to_end(&mut image).expect("it is readable");
    image.truncate(4096 + (1 << 16));
    (file, image)
}

fn read(image: &[u8]) {
    let system = erofs_rs::EroFS::new(erofs_rs::backend::SliceImage::new(image)).expect("an EROFS");
    for entry in system.walk_dir("/").expect("a root") {
        let entry = entry.expect("an entry");
        system.xattrs_inode(entry.inode).expect("its attributes");
        if entry.inode.is_file() {
            let mut file = system.open_inode_file(entry.inode).expect("its data");
            // A hole of gigabytes takes no room, but takes time.
            std::io::copy(&mut file.by_ref().take(1 << 20), &mut std::io::sink()).expect("its data");
        } else if entry.inode.is_symlink() {
            assert!(!system.read_link_inode(entry.inode).expect("its target").as_bytes().is_empty());
        }
    }
}
