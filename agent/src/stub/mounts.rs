//! The container's mounts, made by its first process in its own mount namespace.
//!
//! Everything is attached by descriptor, never by a path in the container: the image, and volumes other containers write to,
//! may hold any symbolic link.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isopod_proto::ErrorKind;
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use super::Descriptors;
use super::message::{Descriptor, Device, Filesystem, FilesystemOption, Launch, PlannedMount, Source};
use crate::beneath::{self, Make};
use crate::error::{Context as _, Error, Result};
use crate::sys::{self, MountAttributes};

/// Makes the container's namespaces and mounts and enters its root, which the current directory then is.
///
/// With a user namespace, what needs the guest's privileges comes first: file systems and binds are made before it is entered,
/// and attached in it, so that the places that are made for them are its root's.
pub fn enter_new_root(launch: &Launch, descriptors: &Descriptors) -> Result<()> {
    let root = descriptors.required(Descriptor::RootMount)?;
    let user_namespace = descriptors.get(Descriptor::UserNamespace);
    new_namespaces(launch.new_ipc_namespace)?;
    let mounts = launch.mounts.iter().map(|mount| {
        let text = || format!("mount {:?} in the container", mount.destination);
        make_mount(mount, &launch.devices, user_namespace).map_err(|error| error.within(text()))
    });
    let mounts: Vec<NewMount> = mounts.collect::<Result<_>>()?;
    // The root of a user namespace may not be able to walk there, but stays where it is.
    rustix::process::chdir(launch.mount_point.as_str()).context(|| format!("enter {}", launch.mount_point))?;
    if let Some(namespace) = user_namespace {
        super::user_namespace::enter(namespace)?;
    }
    new_mount_namespace()?;
    attach_at_path(&root, ".")?;
    for NewMount { mount, destination, is_directory } in &mounts {
        attach_in(root, mount, destination, *is_directory)
            .map_err(|error| error.within(format!("mount {destination:?} in the container")))?;
    }
    for path in &launch.readonly_paths {
        make_readonly(root, path)?;
    }
    for path in &launch.masked_paths {
        mask(root, path)?;
    }
    if launch.readonly_rootfs {
        let readonly = MountAttributes { readonly: true, ..MountAttributes::default() };
        sys::mount_setattr(root, readonly, false).context(|| "make the root file system read-only")?;
    }
    rustix::process::fchdir(root).context(|| "enter the root file system")?;
    rustix::process::pivot_root(".", ".").context(|| "make the image the root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context(|| "detach the agent's root")?;
    rustix::process::chdir("/").context(|| "enter the new root")
}

/// A cgroup namespace of this process alone, and an IPC namespace if asked for.
pub fn new_namespaces(ipc: bool) -> Result<()> {
    let ipc = if ipc { CloneFlags::CLONE_NEWIPC } else { CloneFlags::empty() };
    unshare(CloneFlags::CLONE_NEWCGROUP | ipc).context(|| "make namespaces")
}

/// A mount namespace of this process alone, from which nothing spreads to the agent's.
pub fn new_mount_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context(|| "make a mount namespace")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context(|| "make the mounts private")
}

/// A new instance of a file system, not yet attached.
pub fn new_filesystem(name: &str, options: &[FilesystemOption], attributes: MountAttrFlags) -> Result<OwnedFd> {
    let text = || format!("make a {name} file system with {options:?}");
    let context = rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC).context(text)?;
    for FilesystemOption { key, value } in options {
        if value.is_empty() {
            rustix::mount::fsconfig_set_flag(&context, key.as_str()).context(text)?;
        } else {
            rustix::mount::fsconfig_set_string(&context, key.as_str(), value.as_str()).context(text)?;
        }
    }
    rustix::mount::fsconfig_create(&context).context(text)?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context(text)
}

/// Attaches `mount` at a path that the agent made.
pub fn attach_at_path(mount: &impl AsFd, path: &str) -> Result<()> {
    rustix::mount::move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context(|| format!("attach a mount at {path}"))
}

fn attach(mount: &OwnedFd, place: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", place, "", flags)
}

/// A mount that is attached nowhere yet.
struct NewMount<'p> {
    mount: OwnedFd,
    destination: &'p str,
    is_directory: bool,
}

fn make_mount<'p>(
    planned: &'p PlannedMount,
    devices: &[Device],
    user_namespace: Option<BorrowedFd<'_>>,
) -> Result<NewMount<'p>> {
    let PlannedMount { destination, source, readonly, nodev, noexec, nosuid, idmap } = planned;
    let (mount, is_directory) = match source {
        Some(Source::Bind(path)) => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = rustix::mount::open_tree(CWD, path.as_str(), flags).context(|| format!("open {path}"))?;
            let is_directory = beneath::file_type(&tree).context(|| format!("stat {path}"))? == FileType::Directory;
            (tree, is_directory)
        }
        Some(Source::Filesystem(Filesystem { name, options })) => {
            let mount = new_filesystem(name, options, MountAttrFlags::empty())?;
            if destination == "/dev" {
                fill_dev(mount.as_fd(), devices)?;
            }
            (mount, true)
        }
        None => return Err(Error::new(ErrorKind::Internal, "a planned mount without a source")),
    };
    if let (true, Some(namespace)) = (idmap, user_namespace) {
        sys::idmap(mount.as_fd(), namespace).context(|| "map its owners into the user namespace")?;
    }
    let attributes = MountAttributes { readonly: *readonly, nodev: *nodev, noexec: *noexec, nosuid: *nosuid };
    sys::mount_setattr(mount.as_fd(), attributes, false).context(|| format!("set {attributes:?}"))?;
    Ok(NewMount { mount, destination, is_directory })
}

fn attach_in(root: BorrowedFd<'_>, mount: &OwnedFd, destination: &str, is_directory: bool) -> Result<()> {
    let make =
        if is_directory { Make::Directory(Mode::from_raw_mode(0o755)) } else { Make::File(Mode::from_raw_mode(0o644)) };
    let place = beneath::make(root, destination, make).context(|| "make the place for it")?;
    attach(mount, place.descriptor.as_fd()).context(|| "attach it")
}

/// The nodes and links that programs expect in /dev (OCI runtime specification, config-linux, "Default Devices").
fn fill_dev(dev: BorrowedFd<'_>, devices: &[Device]) -> Result<()> {
    for device in devices {
        let kind = if device.block { FileType::BlockDevice } else { FileType::CharacterDevice };
        let mode = Mode::from_raw_mode(device.mode);
        let number = rustix::fs::makedev(device.major, device.minor);
        let text = || format!("make the device node /dev/{}", device.path);
        let (parent, name) = match device.path.rsplit_once('/') {
            Some((parent, name)) => {
                let make = Make::Directory(Mode::from_raw_mode(0o755));
                (beneath::make(dev, parent, make).context(text)?.descriptor, name)
            }
            None => (rustix::io::fcntl_dupfd_cloexec(dev, 3).context(text)?, device.path.as_str()),
        };
        rustix::fs::mknodat(&parent, name, kind, mode, number).context(text)?;
        rustix::fs::chmodat(&parent, name, mode, rustix::fs::AtFlags::empty()).context(text)?;
    }
    for (target, name) in [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("/proc/kcore", "core"),
        ("pts/ptmx", "ptmx"),
    ] {
        rustix::fs::symlinkat(target, dev, name).context(|| format!("make the link /dev/{name}"))?;
    }
    Ok(())
}

/// Makes the terminal `slave` the container's /dev/console, in a root that has been entered.
pub fn attach_console(slave: &OwnedFd) -> Result<()> {
    let text = || "attach the terminal at /dev/console";
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).context(text)?;
    let place = beneath::make(root.as_fd(), "/dev/console", Make::File(Mode::from_raw_mode(0o600))).context(text)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(slave, "", flags).context(text)?;
    attach(&tree, place.descriptor.as_fd()).context(text)
}

/// Opens what is to be protected; a path that is not there needs no protection.
fn open_existing(root: BorrowedFd<'_>, path: &str) -> Result<Option<OwnedFd>> {
    match beneath::open(root, path, OFlags::PATH) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(Error::io(format!("open {path:?} in the container"), error)),
    }
}

fn make_readonly(root: BorrowedFd<'_>, path: &str) -> Result<()> {
    let Some(place) = open_existing(root, path)? else { return Ok(()) };
    let text = || format!("make {path:?} read-only");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(&place, "", flags | OpenTreeFlags::AT_EMPTY_PATH).context(text)?;
    let readonly = MountAttributes { readonly: true, ..MountAttributes::default() };
    sys::mount_setattr(tree.as_fd(), readonly, true).context(text)?;
    attach(&tree, place.as_fd()).context(text)
}

fn mask(root: BorrowedFd<'_>, path: &str) -> Result<()> {
    let Some(place) = open_existing(root, path)? else { return Ok(()) };
    let text = || format!("mask {path:?}");
    let cover = if beneath::file_type(&place).context(text)? == FileType::Directory {
        let size = FilesystemOption { key: "size".into(), value: "4096".into() };
        new_filesystem("tmpfs", &[size], MountAttrFlags::MOUNT_ATTR_RDONLY)?
    } else {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        rustix::mount::open_tree(CWD, "/dev/null", flags).context(text)?
    };
    attach(&cover, place.as_fd()).context(text)
}
