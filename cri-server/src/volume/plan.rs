//! From CRI's mounts to what they ask for.

use std::path::{Component, Path, PathBuf};

use crate::container::SpecError;
use crate::cri::{self, MountPropagation};

const FIELD: &str = "config.mounts";

/// A mount that can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Where in the container.
    pub destination: String,
    /// What.
    pub source: Source,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory or file of the host.
    Host(HostSource),
    /// An image, read-only.
    Image {
        /// As the image store knows it.
        image: String,
        /// What of it; empty: all.
        sub_path: String,
    },
}

/// A directory or file of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSource {
    /// Where; absolute.
    pub path: PathBuf,
    /// What may be written.
    pub access: Access,
    /// What the host mounts there later shows too (HOST_TO_CONTAINER).
    pub follow_host: bool,
}

/// What of a tree may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// All that the host lets root write.
    Writable,
    /// Not the topmost mount; what is mounted below it is as it is on the host.
    Readonly,
    /// Nothing, on no mount of the tree.
    RecursiveReadonly,
}

fn invalid(mount: &cri::Mount, problem: &str) -> SpecError {
    SpecError::Invalid { field: FIELD, problem: format!("the mount at {:?} {problem}", shown(&mount.container_path)) }
}

fn unsupported(mount: &cri::Mount, what: &str) -> SpecError {
    SpecError::Unsupported { field: FIELD, what: format!("{what} (the mount at {:?})", shown(&mount.container_path)) }
}

fn shown(text: &str) -> String {
    text.chars().take(200).collect()
}

/// Checks the ids that mounts are mapped with: they must be those of the container's user namespace, with which the guest maps
/// every mount of such a container.
pub fn check_mappings(mounts: &[cri::Mount], namespace: Option<&cri::UserNamespace>) -> Result<(), SpecError> {
    let namespace = namespace.filter(|namespace| namespace.mode() == cri::NamespaceMode::Pod);
    let foreign = |mount: &&cri::Mount| {
        let mapped = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
        mapped && namespace.is_none_or(|ids| mount.uid_mappings != ids.uids || mount.gid_mappings != ids.gids)
    };
    match mounts.iter().find(foreign) {
        Some(mount) => Err(unsupported(mount, "id mappings other than those of the pod's user namespace")),
        None => Ok(()),
    }
}

/// What `mounts` ask for.
pub fn plan(mounts: &[cri::Mount]) -> Result<Vec<Volume>, SpecError> {
    mounts.iter().map(volume).collect()
}

fn volume(mount: &cri::Mount) -> Result<Volume, SpecError> {
    check_destination(mount)?;
    let source = match &mount.image {
        Some(image) => image_source(mount, image)?,
        None => Source::Host(host_source(mount)?),
    };
    Ok(Volume { destination: mount.container_path.clone(), source })
}

/// A place in the container. The kernel's own file systems are the runtime's to mount: a file over one of theirs would lie to
/// whoever reads it.
fn check_destination(mount: &cri::Mount) -> Result<(), SpecError> {
    let path = Path::new(&mount.container_path);
    let up = path.components().any(|component| component == Component::ParentDir);
    if !path.is_absolute() || path.parent().is_none() || up || mount.container_path.contains('\0') {
        return Err(invalid(mount, "is not at an absolute path below the container's root"));
    }
    if path.starts_with("/proc") || path == Path::new("/sys") || path == Path::new("/dev") {
        return Err(invalid(mount, "would cover a file system that every container has"));
    }
    Ok(())
}

fn image_source(mount: &cri::Mount, image: &cri::ImageSpec) -> Result<Source, SpecError> {
    if image.image.is_empty() {
        return Err(invalid(mount, "names no image"));
    }
    if !mount.host_path.is_empty() {
        return Err(invalid(mount, "is of an image and of a host path at once"));
    }
    if !mount.readonly {
        return Err(invalid(mount, "is of an image, and must have readonly set"));
    }
    if mount.propagation() != MountPropagation::PropagationPrivate {
        return Err(invalid(mount, "is of an image, in which the host mounts nothing"));
    }
    let sub_path = Path::new(&mount.image_sub_path);
    let up = sub_path.components().any(|component| component == Component::ParentDir);
    if sub_path.is_absolute() || up || mount.image_sub_path.contains('\0') {
        return Err(invalid(mount, "has an image_sub_path that is not a relative path without \"..\""));
    }
    Ok(Source::Image { image: image.image.clone(), sub_path: mount.image_sub_path.clone() })
}

fn host_source(mount: &cri::Mount) -> Result<HostSource, SpecError> {
    let path = PathBuf::from(&mount.host_path);
    if !path.is_absolute() || mount.host_path.contains('\0') {
        return Err(invalid(mount, "has a host_path that is not absolute"));
    }
    if !mount.image_sub_path.is_empty() {
        return Err(invalid(mount, "has an image_sub_path without an image"));
    }
    let follow_host = match MountPropagation::try_from(mount.propagation) {
        Ok(MountPropagation::PropagationPrivate) => false,
        Ok(MountPropagation::PropagationHostToContainer) => true,
        Ok(MountPropagation::PropagationBidirectional) => {
            // A mount in a guest is one of another kernel.
            return Err(unsupported(mount, "mount propagation PROPAGATION_BIDIRECTIONAL"));
        }
        Err(_) => return Err(invalid(mount, "has an unknown propagation")),
    };
    let access = match (mount.readonly, mount.recursive_read_only) {
        (false, false) => Access::Writable,
        (true, false) => Access::Readonly,
        (true, true) if !follow_host => Access::RecursiveReadonly,
        (true, true) => {
            return Err(invalid(mount, "has recursive_read_only set, which needs PROPAGATION_PRIVATE"));
        }
        (false, true) => return Err(invalid(mount, "has recursive_read_only set without readonly")),
    };
    Ok(HostSource { path, access, follow_host })
}

#[cfg(test)]
mod tests {
    use isopod_proto::ErrorKind;

    use super::*;

    fn mount() -> cri::Mount {
        cri::Mount { container_path: "/data".into(), host_path: "/srv".into(), ..Default::default() }
    }

    fn refused(mount: cri::Mount) -> SpecError {
        plan(&[mount]).expect_err("refused")
    }

    #[test]
    fn a_host_path_is_writable_and_private_unless_it_says_otherwise() {
        let of = |mount: cri::Mount| match plan(&[mount]).expect("good").remove(0).source {
            Source::Host(host) => (host.access, host.follow_host),
            Source::Image { .. } => panic!("a host path"),
        };
        assert_eq!(of(mount()), (Access::Writable, false));
        assert_eq!(of(cri::Mount { readonly: true, ..mount() }), (Access::Readonly, false));
        let recursive = cri::Mount { readonly: true, recursive_read_only: true, ..mount() };
        assert_eq!(of(recursive), (Access::RecursiveReadonly, false));
        let follows = cri::Mount { propagation: MountPropagation::PropagationHostToContainer.into(), ..mount() };
        assert_eq!(of(follows), (Access::Writable, true));
    }

    #[test]
    fn recursive_read_only_needs_readonly_and_private() {
        let recursive = cri::Mount { recursive_read_only: true, readonly: true, ..mount() };
        for propagation in [MountPropagation::PropagationHostToContainer, MountPropagation::PropagationBidirectional] {
            refused(cri::Mount { propagation: propagation.into(), ..recursive.clone() });
        }
        assert_eq!(refused(cri::Mount { readonly: false, ..recursive }).kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn bidirectional_propagation_is_refused_by_its_name() {
        let error = refused(cri::Mount { propagation: MountPropagation::PropagationBidirectional.into(), ..mount() });
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
        assert!(error.to_string().contains("PROPAGATION_BIDIRECTIONAL") && error.to_string().contains("/data"));
    }

    #[test]
    fn mounts_are_mapped_as_the_user_namespace_is() {
        let ids = |host_id| vec![cri::IdMapping { host_id, container_id: 0, length: 65536 }];
        let namespace = |host_id| cri::UserNamespace { mode: 0, uids: ids(host_id), gids: ids(host_id) };
        let mapped = [cri::Mount { uid_mappings: ids(7), gid_mappings: ids(7), ..mount() }];
        assert!(check_mappings(&mapped, Some(&namespace(7))).is_ok());
        assert!(check_mappings(&mapped, Some(&namespace(8))).is_err());
        assert!(check_mappings(&mapped, None).is_err());
        assert!(check_mappings(&[mount()], None).is_ok());
    }

    #[test]
    fn bad_places_are_refused() {
        for bad in ["", "/", "relative", "/a/../b", "/proc", "/proc/meminfo", "/sys", "/dev"] {
            let error = refused(cri::Mount { container_path: bad.into(), ..mount() });
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{bad}");
        }
        for good in ["/etc/hosts", "/dev/termination-log", "/dev/shm", "/sys/fs/x"] {
            plan(&[cri::Mount { container_path: good.into(), ..mount() }]).expect(good);
        }
        for bad in ["", "relative"] {
            refused(cri::Mount { host_path: bad.into(), ..mount() });
        }
    }

    #[test]
    fn an_image_is_read_only_and_alone() {
        let image = || cri::Mount {
            image: Some(cri::ImageSpec { image: "busybox".into(), ..Default::default() }),
            host_path: String::new(),
            readonly: true,
            image_sub_path: "bin".into(),
            ..mount()
        };
        let source = plan(&[image()]).expect("good").remove(0).source;
        assert_eq!(source, Source::Image { image: "busybox".into(), sub_path: "bin".into() });
        for bad in [
            cri::Mount { readonly: false, ..image() },
            cri::Mount { host_path: "/x".into(), ..image() },
            cri::Mount { image_sub_path: "../x".into(), ..image() },
            cri::Mount { image_sub_path: "/x".into(), ..image() },
            cri::Mount { propagation: 1, ..image() },
        ] {
            assert_eq!(refused(bad).kind(), ErrorKind::InvalidArgument);
        }
    }
}
