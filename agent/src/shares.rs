//! What the host shares with the pod: one virtio-fs file system, mounted where only the agent sees it. Containers get pieces
//! of it by bind mounts.

use std::fs;
use std::time::{Duration, Instant};

use isopod_proto::ErrorKind;
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::error::{Context as _, Error, Result};
use crate::layout::Layout;

/// How long the device may take to appear after a rescan of the bus, which itself is synchronous.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(10);

/// Finds the device with this tag and mounts it. Blocks.
pub fn attach(layout: &Layout, tag: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if tag.is_empty() || tag.len() > 36 || !tag.bytes().all(plain) {
        return Err(Error::invalid("the tag of a file system is 1 to 36 ASCII letters, digits and '-'"));
    }
    fs::write("/sys/bus/pci/rescan", "1").context(|| "scan the PCI bus")?;
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    loop {
        // A device node of the host's would be a device of the guest's here.
        match rustix::mount::mount(tag, layout.shares(), "virtiofs", MountFlags::NODEV, None) {
            // No such tag: its driver is still at it.
            Err(Errno::INVAL) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Err(Errno::INVAL) => {
                let text = format!("no file system with the tag {tag} appeared");
                return Err(Error::new(ErrorKind::DeadlineExceeded, text));
            }
            result => return result.context(|| format!("mount the file system {tag}")),
        }
    }
}

/// The path of the share `name`.
pub fn path(layout: &Layout, name: &str) -> Result<String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.';
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(Error::invalid(format!(
            "{:?} is not the name of a share",
            name.chars().take(80).collect::<String>()
        )));
    }
    let path = layout.shares().join(name);
    path.into_os_string().into_string().map_err(|_| Error::invalid("a share's path is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_named_plainly() {
        let layout = Layout::guest();
        assert_eq!(path(&layout, "0af.1").unwrap(), "/run/isopod/shares/0af.1");
        for bad in ["", "..", ".x", "a/b", "a\0"] {
            assert!(path(&layout, bad).is_err(), "{bad:?}");
        }
    }
}
