//! The root file system of a container: an overlay over its image.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::error::{Context as _, Result};
use crate::stub::message::Owner;
use crate::sys;
use crate::user_namespace::UserNamespace;

/// Mounts an overlay of `image`, where that is mounted, with the writable directories below `scratch`, which it makes. The mount is
/// attached nowhere; it ends with its last descriptor and namespace. Device nodes do not open on it unless `devices`: an image's
/// nodes would open the disks of the guest.
pub fn mount_overlay(image: &Path, scratch: &Path, devices: bool) -> Result<OwnedFd> {
    let (upper, work) = make_writable(image, scratch, None)?;
    let attributes = if devices { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_NODEV };
    overlay(image, (&upper, &work), attributes)
}

/// The same for a container in a user namespace, to whose users the files of the image belong. Overlayfs itself knows no
/// idmapped mounts, but takes one as its lower layer; what it writes has the guest's ids. That mount has to be attached for the
/// time being, which it is at `staging`.
pub fn mount_mapped_overlay(
    image: &Path,
    scratch: &Path,
    staging: &Path,
    namespace: &UserNamespace,
) -> Result<OwnedFd> {
    let (upper, work) = make_writable(image, scratch, Some(namespace))?;
    fs::create_dir_all(staging).context(|| format!("make {}", staging.display()))?;
    let text = || format!("map the owners of the image {}", image.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(CWD, image, flags).context(text)?;
    sys::idmap(mount.as_fd(), namespace.descriptor.as_fd()).context(text)?;
    let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mount, "", CWD, staging, attach).context(text)?;
    let mapped = Staged(staging);
    overlay(mapped.0, (&upper, &work), MountAttrFlags::MOUNT_ATTR_NODEV)
}

/// A mount that is detached when dropped.
struct Staged<'a>(&'a Path);

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        // An overlay has its own clone of its lower layer.
        let _ = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
    }
}

/// Makes the upper and work directories below `scratch`. The root of an overlay has the attributes of the upper directory: it is
/// given the image's, whose owner is one of `namespace`.
fn make_writable(image: &Path, scratch: &Path, namespace: Option<&UserNamespace>) -> Result<(PathBuf, PathBuf)> {
    let (upper, work) = (scratch.join("upper"), scratch.join("work"));
    for directory in [&upper, &work] {
        fs::create_dir_all(directory).context(|| format!("make {}", directory.display()))?;
    }
    let text = || format!("give {} the attributes of {}", upper.display(), image.display());
    let metadata = fs::metadata(image).context(text)?;
    let (uid, gid) = (metadata.uid(), metadata.gid());
    let owner = namespace.map(|namespace| namespace.owner(uid, gid)).transpose()?.unwrap_or(Owner { uid, gid });
    std::os::unix::fs::chown(&upper, Some(owner.uid), Some(owner.gid)).context(text)?;
    fs::set_permissions(&upper, fs::Permissions::from_mode(metadata.mode() & 0o7777)).context(text)?;
    Ok((upper, work))
}

fn overlay(image: &Path, (upper, work): (&Path, &Path), attributes: MountAttrFlags) -> Result<OwnedFd> {
    let text = || format!("mount an overlay of {} over {}", upper.display(), image.display());
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context(text)?;
    rustix::mount::fsconfig_set_string(&context, "lowerdir+", image).context(text)?;
    rustix::mount::fsconfig_set_string(&context, "upperdir", upper).context(text)?;
    rustix::mount::fsconfig_set_string(&context, "workdir", work).context(text)?;
    // The upper directory never outlives the pod, so nothing is gained by waiting for the disk.
    rustix::mount::fsconfig_set_flag(&context, "volatile").context(text)?;
    rustix::mount::fsconfig_create(&context).context(text)?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context(text)
}
