//! Devices of the host that a container asks for.
//!
//! A block device is given to the VM as a disk. A character device of the host is not: its driver is in the host's kernel. Those
//! that every kernel has are the guest's own instead, which is what a program that asks for them wants.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use isopod_proto::ErrorKind;

use crate::container::SpecError;
use crate::cri;

const FIELD: &str = "config.devices";
/// Character devices that mean the same in a guest, by their paths below /dev.
const OF_GUEST: [&str; 8] = ["null", "zero", "full", "random", "urandom", "tty", "fuse", "net/tun"];
/// Bytes that a disk's length is a multiple of.
const SECTOR: u64 = 512;

/// A device that a container asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Where, below /dev of the container.
    pub path: String,
    /// The device on the host.
    pub host_path: PathBuf,
    /// Whether it may be written.
    pub writable: bool,
}

/// A device, taken.
#[derive(Debug)]
pub enum Taken {
    /// A block device: open, and its bytes.
    Block(File, u64, Node),
    /// The guest's own device of this name.
    Guest(String, Node),
}

/// What the device's node on the host is like.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// Permission bits.
    pub mode: u32,
}

/// A device that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A system call failed.
    #[error("cannot {doing} the device {path}")]
    Path {
        /// What was tried.
        doing: &'static str,
        /// Which device.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not a device at all.
    #[error("{0} is not a device")]
    NotADevice(PathBuf),
    /// A device of the host's kernel.
    #[error("isopod does not support the character device {0} of the host in a guest")]
    Character(PathBuf),
}

impl DeviceError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Path { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Path { .. } => ErrorKind::FailedPrecondition,
            Self::NotADevice(_) => ErrorKind::InvalidArgument,
            Self::Character(_) => ErrorKind::Unimplemented,
        }
    }
}

/// What `devices` ask for.
pub fn plan(devices: &[cri::Device]) -> Result<Vec<Wanted>, SpecError> {
    devices.iter().map(wanted).collect()
}

fn wanted(device: &cri::Device) -> Result<Wanted, SpecError> {
    let cri::Device { container_path, host_path, permissions } = device;
    let invalid = |problem: &str| {
        let shown: String = host_path.chars().take(200).collect();
        SpecError::Invalid { field: FIELD, problem: format!("the device {shown:?} {problem}") }
    };
    let below = Path::new(container_path).strip_prefix("/dev").ok().and_then(Path::to_str).filter(|path| {
        let plain = Path::new(path).components().all(|component| matches!(component, Component::Normal(_)));
        !path.is_empty() && plain && !path.contains('\0')
    });
    let path = below.ok_or_else(|| invalid("has a container_path that is not below /dev"))?.to_owned();
    if !host_path.starts_with('/') || host_path.contains('\0') {
        return Err(invalid("is not an absolute path"));
    }
    if permissions.is_empty() || !permissions.chars().all(|permission| "rwm".contains(permission)) {
        return Err(invalid("has permissions that are not made of r, w and m"));
    }
    if !permissions.contains('r') {
        return Err(invalid("has permissions without r, which nothing in a guest would keep to"));
    }
    Ok(Wanted { path, host_path: host_path.into(), writable: permissions.contains('w') })
}

/// Takes the device. Blocks.
pub fn take(wanted: &Wanted) -> Result<Taken, DeviceError> {
    let path = &wanted.host_path;
    let failed = |doing| move |source| DeviceError::Path { doing, path: path.clone(), source };
    let metadata = std::fs::metadata(path).map_err(failed("find"))?;
    let node = Node { mode: metadata.mode() & 0o777 };
    let kind = metadata.file_type();
    if kind.is_char_device() {
        let name = path.strip_prefix("/dev").ok().and_then(Path::to_str).filter(|name| OF_GUEST.contains(name));
        let name = name.ok_or_else(|| DeviceError::Character(path.clone()))?;
        return Ok(Taken::Guest(name.to_owned(), node));
    }
    if !kind.is_block_device() {
        return Err(DeviceError::NotADevice(path.clone()));
    }
    let mut file = OpenOptions::new().read(true).write(wanted.writable).open(path).map_err(failed("open"))?;
    let length = file.seek(SeekFrom::End(0)).map_err(failed("find the size of"))?;
    let whole = length - length % SECTOR;
    if whole == 0 {
        return Err(failed("use")(io::Error::other("it has no sectors")));
    }
    Ok(Taken::Block(file, whole, node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(container: &str, host: &str, permissions: &str) -> cri::Device {
        cri::Device { container_path: container.into(), host_path: host.into(), permissions: permissions.into() }
    }

    #[test]
    fn a_device_goes_below_dev() {
        let wanted = plan(&[device("/dev/disk/a", "/dev/loop0", "rwm")]).expect("good").remove(0);
        assert_eq!((wanted.path.as_str(), wanted.writable), ("disk/a", true));
        assert!(!plan(&[device("/dev/x", "/dev/loop0", "rm")]).expect("good")[0].writable);
        for bad in [
            device("/dev", "/dev/loop0", "rwm"),
            device("/dev/../x", "/dev/loop0", "rwm"),
            device("/data", "/dev/loop0", "rwm"),
            device("/dev/x", "loop0", "rwm"),
            device("/dev/x", "/dev/loop0", ""),
            device("/dev/x", "/dev/loop0", "rwx"),
            device("/dev/x", "/dev/loop0", "w"),
        ] {
            assert_eq!(plan(&[bad]).expect_err("refused").kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn only_devices_that_a_guest_has_are_the_guests() {
        let take = |host: &str| take(&plan(&[device("/dev/x", host, "rwm")]).expect("good")[0]);
        assert!(matches!(take("/dev/null"), Ok(Taken::Guest(name, _)) if name == "null"));
        assert_eq!(take("/dev/kmsg").expect_err("refused").kind(), ErrorKind::Unimplemented);
        assert_eq!(take("/etc/passwd").expect_err("refused").kind(), ErrorKind::InvalidArgument);
        assert_eq!(take("/dev/no-such-device").expect_err("refused").kind(), ErrorKind::NotFound);
    }
}
