//! The root file system of a container: an overlay over the layers of its image.

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

/// Mounts an overlay of `layers` (the top one first) with the writable directories below `scratch`, which it makes. The mount is
/// attached nowhere; it ends with its last descriptor and namespace.
///
/// Layers mark what they remove as overlayfs itself does: character devices 0/0 and `trusted.overlay.opaque`. Device nodes
/// do not open on it unless `devices`: an image's nodes would open the disks of the guest.
pub fn mount_overlay(layers: &[PathBuf], scratch: &Path, devices: bool) -> Result<OwnedFd> {
    let (upper, work) = make_writable(layers, scratch, None)?;
    let attributes = if devices { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_NODEV };
    overlay(layers, (&upper, &work), attributes)
}

/// The same for a container in a user namespace, to whose users the files of the layers belong. Overlayfs itself knows no
/// idmapped mounts, but takes them as layers; what it writes has the guest's ids. The layers have to be attached for the time
/// being, which they are at `staging`.
pub fn mount_mapped_overlay(
    layers: &[PathBuf],
    scratch: &Path,
    staging: &Path,
    namespace: &UserNamespace,
) -> Result<OwnedFd> {
    let (upper, work) = make_writable(layers, scratch, Some(namespace))?;
    let mut mapped = Staged(Vec::new());
    for (number, layer) in layers.iter().enumerate() {
        let place = staging.join(number.to_string());
        fs::create_dir_all(&place).context(|| format!("make {}", place.display()))?;
        let text = || format!("map the owners of the layer {}", layer.display());
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = rustix::mount::open_tree(CWD, layer.as_path(), flags).context(text)?;
        sys::idmap(mount.as_fd(), namespace.descriptor.as_fd()).context(text)?;
        let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&mount, "", CWD, place.as_path(), attach).context(text)?;
        mapped.0.push(place);
    }
    overlay(&mapped.0, (&upper, &work), MountAttrFlags::MOUNT_ATTR_NODEV)
}

/// Mounts that are detached when dropped.
struct Staged(Vec<PathBuf>);

impl Drop for Staged {
    fn drop(&mut self) {
        for place in &self.0 {
            // An overlay has its own clones of its layers.
            let _ = rustix::mount::unmount(place, UnmountFlags::DETACH);
        }
    }
}

/// Makes the upper and work directories below `scratch`. The root of an overlay has the attributes of the topmost directory:
/// those of the top layer, whose owner is one of `namespace`.
fn make_writable(layers: &[PathBuf], scratch: &Path, namespace: Option<&UserNamespace>) -> Result<(PathBuf, PathBuf)> {
    let (upper, work) = (scratch.join("upper"), scratch.join("work"));
    for directory in [&upper, &work] {
        fs::create_dir_all(directory).context(|| format!("make {}", directory.display()))?;
    }
    if let Some(top) = layers.first() {
        let text = || format!("give {} the attributes of {}", upper.display(), top.display());
        let metadata = fs::metadata(top).context(text)?;
        let (uid, gid) = (metadata.uid(), metadata.gid());
        let owner = namespace.map(|namespace| namespace.owner(uid, gid)).transpose()?.unwrap_or(Owner { uid, gid });
        std::os::unix::fs::chown(&upper, Some(owner.uid), Some(owner.gid)).context(text)?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(metadata.mode() & 0o7777)).context(text)?;
    }
    Ok((upper, work))
}

fn overlay(layers: &[PathBuf], (upper, work): (&Path, &Path), attributes: MountAttrFlags) -> Result<OwnedFd> {
    let text = || format!("mount an overlay of {} layers over {}", layers.len(), upper.display());
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context(text)?;
    for layer in layers {
        rustix::mount::fsconfig_set_string(&context, "lowerdir+", layer.as_path())
            .context(|| format!("add the layer {}", layer.display()))?;
    }
    rustix::mount::fsconfig_set_string(&context, "upperdir", upper).context(text)?;
    rustix::mount::fsconfig_set_string(&context, "workdir", work).context(text)?;
    // The upper directory never outlives the pod, so nothing is gained by waiting for the disk.
    rustix::mount::fsconfig_set_flag(&context, "volatile").context(text)?;
    rustix::mount::fsconfig_create(&context).context(text)?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context(text)
}
