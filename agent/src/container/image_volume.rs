//! Images as volumes: their layers as one read-only tree.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use isopod_proto::ErrorKind;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};

use crate::beneath;
use crate::error::{Context as _, Error, Result};

/// The path of `sub_path` in the tree that `layers` (the top one first) make, for which it makes a mount at `place` if it takes
/// more than one.
pub fn mount(layers: &[PathBuf], sub_path: &str, place: &Path) -> Result<String> {
    let root = match layers {
        [] => return Err(Error::invalid("an image volume has no layers")),
        [only] => only.as_path(),
        several => {
            mount_together(several, place)?;
            place
        }
    };
    // Nothing in it changes, so that a path found once stays that path.
    let text = || format!("find {sub_path:?} in the image");
    let root =
        rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).context(text)?;
    // Whatever it is that fails: the image does not have it.
    let found = beneath::open(root.as_fd(), sub_path, OFlags::PATH)
        .context(text)
        .map_err(|error| error.with_kind(ErrorKind::NotFound))?;
    let path = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).context(text)?;
    path.into_os_string().into_string().map_err(|_| Error::invalid(format!("{sub_path:?} is a path that is not UTF-8")))
}

fn mount_together(layers: &[PathBuf], place: &Path) -> Result<()> {
    let text = || format!("mount {} layers as a volume", layers.len());
    fs::create_dir(place).context(text)?;
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context(text)?;
    for layer in layers {
        rustix::mount::fsconfig_set_string(&context, "lowerdir+", layer.as_path()).context(text)?;
    }
    rustix::mount::fsconfig_create(&context).context(text)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context(text)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mount, "", CWD, place, flags).context(text)
}
