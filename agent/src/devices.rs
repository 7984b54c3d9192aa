//! Device nodes that a container asks for.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use isopod_proto::agent;
use isopod_proto::agent::device::Source;

use crate::disk::Disks;
use crate::error::{Context as _, Error, Result};
use crate::stub::message::Device;

/// Finds out what `device` is in this guest.
pub fn resolve(device: &agent::Device, disks: &Disks) -> Result<Device> {
    let path = below_dev(&device.path)?;
    let (node, block) = match &device.source {
        Some(Source::Disk(disk)) => (disks.device(disk)?, true),
        Some(Source::Guest(name)) => (below_dev(name)?, false),
        None => return Err(Error::invalid(format!("the device {path:?} has no source"))),
    };
    let (major, minor) = numbers(&Path::new("/dev").join(&node), block)?;
    Ok(Device { path, block, major, minor, mode: device.mode & 0o777 })
}

fn below_dev(path: &str) -> Result<String> {
    let component = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if path.len() <= 255 && path.split('/').all(component) {
        return Ok(path.to_owned());
    }
    let shown: String = path.chars().take(80).collect();
    Err(Error::invalid(format!("{shown:?} is not a path below /dev")))
}

fn numbers(node: &Path, block: bool) -> Result<(u32, u32)> {
    let metadata = std::fs::metadata(node).context(|| format!("find the device {}", node.display()))?;
    let kind = metadata.file_type();
    if !(if block { kind.is_block_device() } else { kind.is_char_device() }) {
        let wanted = if block { "block" } else { "character" };
        return Err(Error::invalid(format!("{} is not a {wanted} device of the guest", node.display())));
    }
    Ok((rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_below_dev() {
        assert_eq!(below_dev("net/tun").unwrap(), "net/tun");
        for bad in ["", "/null", "a//b", "..", "a/../b", "a/", "."] {
            assert!(below_dev(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_device_of_another_kind_is_refused() {
        assert_eq!(numbers(Path::new("/dev/null"), false).unwrap(), (1, 3));
        assert!(numbers(Path::new("/dev/null"), true).is_err());
        assert!(numbers(Path::new("/"), false).is_err());
    }
}
