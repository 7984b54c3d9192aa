//! Images as volumes.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use isopod_proto::ErrorKind;
use rustix::fs::{Mode, OFlags};

use crate::beneath;
use crate::error::{Context as _, Error, Result};

/// The path of `sub_path` in the image that is mounted at `root`.
pub fn path(root: &Path, sub_path: &str) -> Result<String> {
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
