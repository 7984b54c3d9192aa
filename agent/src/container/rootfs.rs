//! The root file system of a container: an overlay over the layers of its image.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::error::{Context as _, Result};

/// Mounts an overlay of `layers` (the top one first) with the writable directories below `scratch`, which it makes. The mount is
/// attached nowhere; it ends with its last descriptor and namespace.
///
/// Layers mark what they remove as overlayfs itself does: character devices 0/0 and `trusted.overlay.opaque`. Device nodes
/// do not open on it unless `devices`: an image's nodes would open the disks of the guest.
pub fn mount_overlay(layers: &[PathBuf], scratch: &Path, devices: bool) -> Result<OwnedFd> {
    let text = || format!("mount an overlay of {} layers over {}", layers.len(), scratch.display());
    let (upper, work) = (scratch.join("upper"), scratch.join("work"));
    for directory in [&upper, &work] {
        fs::create_dir_all(directory).context(|| format!("make {}", directory.display()))?;
    }
    // The root of an overlay has the attributes of the topmost directory.
    if let Some(top) = layers.first() {
        let metadata = fs::metadata(top).context(|| format!("stat {}", top.display()))?;
        std::os::unix::fs::chown(&upper, Some(metadata.uid()), Some(metadata.gid())).context(text)?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(metadata.mode() & 0o7777)).context(text)?;
    }
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context(text)?;
    for layer in layers {
        rustix::mount::fsconfig_set_string(&context, "lowerdir+", layer.as_path())
            .context(|| format!("add the layer {}", layer.display()))?;
    }
    rustix::mount::fsconfig_set_string(&context, "upperdir", upper.as_path()).context(text)?;
    rustix::mount::fsconfig_set_string(&context, "workdir", work.as_path()).context(text)?;
    // The upper directory never outlives the pod, so nothing is gained by waiting for the disk.
    rustix::mount::fsconfig_set_flag(&context, "volatile").context(text)?;
    rustix::mount::fsconfig_create(&context).context(text)?;
    let attributes = if devices { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_NODEV };
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context(text)
}
