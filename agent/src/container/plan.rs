//! The mounts and device nodes of a container, as its stub will make them.

use isopod_proto::agent::{CreateContainerRequest, Mount, mount};

use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::stub::message::{Device, Filesystem, FilesystemOption, PlannedMount, Source};
use crate::user_namespace::guest_id;

/// The device nodes every container has (OCI runtime specification, config-linux): name and minor number, major 1 but tty.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// Size of the /dev/shm of a container with an IPC namespace of its own.
const PRIVATE_SHM: &str = "67108864";
/// Group "tty" of every Linux distribution, to which terminals belong.
const TTY_GROUP: u32 = 5;

/// What is mounted, in order: what every container has, without those that a mount of the request replaces, then the
/// requested ones. `sources` are the agent's paths for the requested mounts that have one, by index.
pub fn mounts(
    request: &CreateContainerRequest,
    layout: &Layout,
    sources: &[Option<String>],
) -> Result<Vec<PlannedMount>> {
    let requested: Vec<String> = request.mounts.iter().map(destination).collect::<Result<_>>()?;
    let mut planned: Vec<PlannedMount> = default_mounts(request, layout)
        .into_iter()
        .filter(|default| !requested.contains(&default.destination))
        .collect();
    for ((mount, destination), path) in request.mounts.iter().zip(requested).zip(sources) {
        let source = match (&mount.source, path) {
            (_, Some(path)) => Source::Bind(path.clone()),
            (Some(mount::Source::TmpfsSizeBytes(size)), None) => tmpfs(*size, mount.mode),
            _ => return Err(Error::invalid(format!("the mount at {destination:?} has no source"))),
        };
        let readonly = mount.readonly;
        // What the agent has made holds no program to trust more than others; what the host, an image or another container has may.
        let trusted = |source: &mount::Source| {
            matches!(source, mount::Source::Share(_) | mount::Source::Image(_) | mount::Source::Volume(_))
        };
        let nosuid = !mount.source.as_ref().is_some_and(trusted);
        // A tmpfs that is to be read-only is one nobody can fill; so be it, the daemon asked.
        planned.push(PlannedMount { readonly, nosuid, nodev: true, ..mounted(&destination, source) });
    }
    for mount in &mut planned {
        mount.idmap = knows_idmapped_mounts(mount);
    }
    Ok(planned)
}

/// What a mount shows of the kernel belongs to the guest's root, whoever looks at it. Directories and files belong to whom they
/// belong to in the container.
fn knows_idmapped_mounts(mount: &PlannedMount) -> bool {
    match &mount.source {
        Some(Source::Bind(_)) => true,
        Some(Source::Filesystem(filesystem)) => filesystem.name == "tmpfs",
        None => false,
    }
}

/// The destination without repeated or trailing slashes and `.`; `..` and the root itself are refused.
fn destination(mount: &Mount) -> Result<String> {
    let given = &mount.destination;
    let parts: Vec<&str> = given.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if !given.starts_with('/') || parts.is_empty() || parts.contains(&"..") || given.contains('\0') {
        return Err(Error::invalid(format!("the mount destination {given:?} is not an absolute path below the root")));
    }
    Ok(format!("/{}", parts.join("/")))
}

fn default_mounts(request: &CreateContainerRequest, layout: &Layout) -> Vec<PlannedMount> {
    let privileged = request.privileged;
    let safe = |destination: &str, source| PlannedMount {
        nosuid: true,
        nodev: true,
        noexec: true,
        ..mounted(destination, source)
    };
    // devpts knows no idmapped mounts, so that the group is told as the guest has it.
    let tty = match &request.user_namespace {
        None => Some(TTY_GROUP),
        Some(namespace) => guest_id(&namespace.gids, TTY_GROUP),
    };
    let tty = tty.map(|gid| gid.to_string());
    let mut pts = vec![("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620")];
    pts.extend(tty.as_deref().map(|gid| ("gid", gid)));
    let shm = if request.ipc_private {
        filesystem("tmpfs", &[("mode", "1777"), ("size", PRIVATE_SHM)])
    } else {
        bind(layout.shm())
    };
    let mut mounts = vec![
        safe("/proc", filesystem("proc", &[])),
        PlannedMount { nosuid: true, ..mounted("/dev", filesystem("tmpfs", &[("mode", "0755"), ("size", "1048576")])) },
        PlannedMount { nosuid: true, noexec: true, ..mounted("/dev/pts", filesystem("devpts", &pts)) },
        safe("/dev/shm", shm),
        safe("/dev/mqueue", filesystem("mqueue", &[])),
        PlannedMount { readonly: !privileged, ..safe("/sys", filesystem("sysfs", &[])) },
        PlannedMount { readonly: !privileged, ..safe("/sys/fs/cgroup", filesystem("cgroup2", &[])) },
    ];
    for file in ["hostname", "hosts", "resolv.conf"] {
        let source = bind(layout.pod_file(file));
        mounts.push(PlannedMount { readonly: request.readonly_rootfs, ..safe(&format!("/etc/{file}"), source) });
    }
    mounts
}

fn mounted(destination: &str, source: Source) -> PlannedMount {
    PlannedMount { destination: destination.into(), source: Some(source), ..PlannedMount::default() }
}

fn bind(path: std::path::PathBuf) -> Source {
    Source::Bind(path.to_str().expect("the agent's own paths are ASCII").to_owned())
}

fn filesystem(name: &str, options: &[(&str, &str)]) -> Source {
    let option = |(key, value): &(&str, &str)| FilesystemOption { key: (*key).into(), value: (*value).into() };
    Source::Filesystem(Filesystem { name: name.into(), options: options.iter().map(option).collect() })
}

fn tmpfs(size: u64, mode: u32) -> Source {
    let mode = if mode == 0 { 0o1777 } else { mode & 0o7777 };
    let (mode, size) = (format!("{mode:o}"), size.to_string());
    let mut options = vec![("mode", mode.as_str())];
    if size != "0" {
        options.push(("size", &size));
    }
    filesystem("tmpfs", &options)
}

/// The device nodes that go into the container's /dev. Those that are `asked` for replace others at their paths.
pub fn devices(privileged: bool, asked: &[Device]) -> Vec<Device> {
    let mut devices = default_devices(privileged);
    devices.retain(|device| !asked.iter().any(|other| other.path == device.path));
    devices.extend_from_slice(asked);
    devices
}

fn default_devices(privileged: bool) -> Vec<Device> {
    let mut devices: Vec<Device> = DEVICES
        .iter()
        .map(|(name, major, minor)| Device {
            path: (*name).into(),
            block: false,
            major: *major,
            minor: *minor,
            mode: 0o666,
        })
        .collect();
    if privileged {
        let all = guest_devices(std::path::Path::new("/dev"), "", 0);
        devices.extend(all.into_iter().filter(|device| !DEVICES.iter().any(|(name, ..)| *name == device.path)));
    }
    devices
}

/// The nodes of the guest's devtmpfs. The guest is small; depth and file types are bounded all the same.
fn guest_devices(directory: &std::path::Path, prefix: &str, depth: u32) -> Vec<Device> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let mut devices = Vec::new();
    let Ok(entries) = std::fs::read_dir(directory) else { return devices };
    for entry in entries.flatten() {
        let (Ok(name), Ok(metadata)) = (entry.file_name().into_string(), entry.metadata()) else { continue };
        let path = format!("{prefix}{name}");
        let kind = metadata.file_type();
        let own = ["pts", "shm", "mqueue", "ptmx", "console", "fd", "stdin", "stdout", "stderr", "core"];
        if own.contains(&path.as_str()) {
            continue;
        }
        if kind.is_dir() && depth < 3 {
            devices.extend(guest_devices(&entry.path(), &format!("{path}/"), depth + 1));
        } else if kind.is_char_device() || kind.is_block_device() {
            let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
            let mode = metadata.mode() & 0o777;
            devices.push(Device { path, block: kind.is_block_device(), major, minor, mode });
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(destinations: &[&str]) -> CreateContainerRequest {
        let mount = |destination: &&str| Mount {
            destination: (*destination).into(),
            source: Some(mount::Source::TmpfsSizeBytes(4096)),
            ..Mount::default()
        };
        CreateContainerRequest { mounts: destinations.iter().map(mount).collect(), ..CreateContainerRequest::default() }
    }

    fn plan(destinations: &[&str]) -> Result<Vec<PlannedMount>> {
        mounts(&request(destinations), &Layout::guest(), &vec![None; destinations.len()])
    }

    #[test]
    fn a_requested_mount_replaces_the_default_at_its_place() {
        let count = |plan: &[PlannedMount], at: &str| plan.iter().filter(|mount| mount.destination == at).count();
        let planned = plan(&["/etc//hosts/", "/data"]).unwrap();
        assert_eq!((count(&planned, "/etc/hosts"), count(&planned, "/data")), (1, 1));
        assert_eq!(planned.last().unwrap().destination, "/data");
    }

    #[test]
    fn destinations_that_are_no_place_are_refused() {
        for bad in ["", "/", "relative", "/a/../b", "//.", "/nul\0"] {
            assert!(plan(&[bad]).unwrap_err().chain().contains(&format!("{bad:?}")));
        }
    }

    #[test]
    fn sys_is_writable_for_the_privileged_only() {
        let readonly = |privileged| {
            let request = CreateContainerRequest { privileged, ..request(&[]) };
            let planned = mounts(&request, &Layout::guest(), &[]).unwrap();
            planned.iter().find(|mount| mount.destination == "/sys").unwrap().readonly
        };
        assert!(readonly(false) && !readonly(true));
    }
}
