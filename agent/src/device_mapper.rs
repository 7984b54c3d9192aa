//! dm-verity devices: what is read from a disk through one is what its root hash names, or an I/O error
//! (Documentation/admin-guide/device-mapper/verity.rst; the interface is include/uapi/linux/dm-ioctl.h).

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use isopod_proto::agent::Verity;

use crate::error::{Context as _, Error, Result};
use crate::sys;

const CONTROL: &str = "/dev/mapper/control";
/// Bytes of a SHA-256 hash, of a block of data or hashes, and of a sector.
const HASH_BYTES: usize = 32;
const BLOCK_BYTES: u64 = 4096;
const SECTOR_BYTES: u64 = 512;

const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
/// Without its flag `DM_SUSPEND_FLAG` (1 << 1), resumes: the table that was loaded is the device's from then on.
const DEV_SUSPEND: u8 = 6;
const TABLE_LOAD: u8 = 9;
const READONLY_FLAG: u32 = 1 << 0;
/// A device that is still in use goes with its last user.
const DEFERRED_REMOVE: u32 = 1 << 17;

/// Where the fields of `struct dm_ioctl` are, and its size; then those of `struct dm_target_spec`, which may follow it.
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const FLAGS: usize = 28;
const DEV: usize = 40;
const NAME: usize = 48;
const NAME_MAX: usize = 127;
const HEADER: usize = sys::DM_IOCTL_SIZE;
const TARGET_LENGTH: usize = 8;
const TARGET_NEXT: usize = 20;
const TARGET_TYPE: usize = 24;
const TARGET: usize = 40;

/// Makes the device `name` of `disk`, a device below /dev, and gives its path.
pub fn open_verity(name: &str, disk: &str, verity: &Verity) -> Result<PathBuf> {
    let control = control()?;
    let numbers = std::fs::read_to_string(Path::new("/sys/block").join(disk).join("dev"));
    let numbers = numbers.context(|| format!("read the number of {disk}"))?;
    let table = table(numbers.trim_end(), verity)?;
    let sectors = verity.data_blocks * (BLOCK_BYTES / SECTOR_BYTES);
    let text = || format!("make a dm-verity device of {disk}");
    let (mut create, mut load) = (request(name, 0)?, load(name, sectors, &table)?);
    let mut resume = request(name, READONLY_FLAG)?;
    sys::device_mapper(control.as_fd(), DEV_CREATE, &mut create).context(text)?;
    let device = field(&create, DEV);
    let loaded = sys::device_mapper(control.as_fd(), TABLE_LOAD, &mut load)
        .and_then(|()| sys::device_mapper(control.as_fd(), DEV_SUSPEND, &mut resume))
        .context(text);
    match loaded {
        Ok(()) => Ok(PathBuf::from(format!("/dev/dm-{}", rustix::fs::minor(device)))),
        Err(error) => {
            // The first error is the one to be told.
            let _ = close(name);
            Err(error)
        }
    }
}

/// Removes the device `name`, at once or with its last user. One that is not there is a success.
pub fn close(name: &str) -> Result<()> {
    let mut request = request(name, DEFERRED_REMOVE)?;
    match sys::device_mapper(control()?.as_fd(), DEV_REMOVE, &mut request) {
        // It is gone: a privileged container can do that too.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
        removed => removed.context(|| format!("remove the dm-verity device of disk {name}")),
    }
}

fn control() -> Result<File> {
    File::options().read(true).write(true).open(CONTROL).context(|| format!("open {CONTROL}"))
}

/// The parameters of the target: version, data and hash device, their block sizes, data blocks, where the hashes begin, algorithm,
/// root hash, and salt. `disk` is its device number, `MAJOR:MINOR`.
fn table(disk: &str, verity: &Verity) -> Result<String> {
    let Verity { root_hash, data_blocks } = verity;
    if root_hash.len() != HASH_BYTES || *data_blocks == 0 || *data_blocks > u64::from(u32::MAX) {
        return Err(Error::invalid("an image has no root hash, or no size, that dm-verity takes"));
    }
    let root: String = root_hash.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("1 {disk} {disk} {BLOCK_BYTES} {BLOCK_BYTES} {data_blocks} {data_blocks} sha256 {root} -"))
}

/// A request about the device `name`, with nothing behind its header.
fn request(name: &str, flags: u32) -> Result<Vec<u8>> {
    if name.is_empty() || name.len() > NAME_MAX || name.contains(['\0', '/']) {
        return Err(Error::invalid(format!("{name:?} is no name of a device")));
    }
    let mut request = vec![0; HEADER];
    // Version 4.0.0, which every kernel since 2.6 answers to.
    request[0] = 4;
    put(&mut request, DATA_SIZE, HEADER as u32);
    put(&mut request, DATA_START, HEADER as u32);
    put(&mut request, FLAGS, flags);
    request[NAME..NAME + name.len()].copy_from_slice(name.as_bytes());
    Ok(request)
}

/// The request that gives the device `name` a table of one target, verity, over all of its `sectors`.
fn load(name: &str, sectors: u64, parameters: &str) -> Result<Vec<u8>> {
    let mut request = request(name, READONLY_FLAG)?;
    let mut target = vec![0; TARGET];
    target[TARGET_LENGTH..TARGET_LENGTH + 8].copy_from_slice(&sectors.to_ne_bytes());
    target[TARGET_TYPE..TARGET_TYPE + 6].copy_from_slice(b"verity");
    target.extend_from_slice(parameters.as_bytes());
    // With a NUL at the end, at least.
    target.resize((target.len() + 1).next_multiple_of(8), 0);
    let next = target.len() as u32;
    put(&mut target, TARGET_NEXT, next);
    request.extend_from_slice(&target);
    put(&mut request, TARGET_COUNT, 1);
    let size = request.len() as u32;
    put(&mut request, DATA_SIZE, size);
    Ok(request)
}

fn put(request: &mut [u8], at: usize, value: u32) {
    request[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

fn field(request: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|index| request[at + index]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verity() -> Verity {
        Verity { root_hash: (0..32).collect(), data_blocks: 256 }
    }

    #[test]
    fn the_table_has_the_words_of_the_kernels_documentation() {
        let root = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
        let expected = format!("1 254:16 254:16 4096 4096 256 256 sha256 {root} -");
        assert_eq!(table("254:16", &verity()).unwrap(), expected);
        for bad in [
            Verity { root_hash: vec![0; 31], ..verity() },
            Verity { data_blocks: 0, ..verity() },
            Verity { data_blocks: 1 << 32, ..verity() },
        ] {
            assert!(table("254:16", &bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_request_says_how_long_it_is() {
        let load = load("img-1", 2048, "1 2 3").unwrap();
        assert_eq!(load.len() as u64, field(&load, DATA_SIZE) & 0xffff_ffff);
        assert_eq!(load.len(), HEADER + TARGET + 8);
        assert_eq!(field(&load, HEADER + TARGET_LENGTH), 2048);
        assert_eq!(&load[HEADER + TARGET..], b"1 2 3\0\0\0");
        assert!(request(&"x".repeat(128), 0).is_err() && request("a/b", 0).is_err());
    }
}
