//! The kubelet's ConfigMap, Secret, projected and downward-API volumes: kept in the guest's memory rather than shared, so that
//! inotify tells of their changes in a container.
//!
//! Each is a small directory that the kubelet's atomic writer changes as a whole. [`read`] takes it into one message; [`watch`]
//! tells when it has changed; a task of the sandbox's driver (`sandbox/mirrors.rs`) sends it to the agent. What is too large, or
//! has something else than directories, files and links in it, is shared as every other directory of the host is.

pub mod read;
pub mod watch;

use std::path::{Component, Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::plan::{Access, HostSource};

/// Names of the plugins whose volumes the kubelet writes itself, as it writes them.
const PLUGINS: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];

/// Whether this is one of the kubelet's own volumes, whole, at `…/pods/<uid>/volumes/<plugin>/<name>`. Of one that is to be
/// writable, what a container writes would be lost; the kubelet mounts all of them read-only.
pub fn is_mirrored(source: &HostSource) -> bool {
    if source.access == Access::Writable || source.follow_host {
        return false;
    }
    let mut parts = source.path.components().rev();
    let mut name = || match parts.next() {
        Some(Component::Normal(name)) => name.to_str(),
        _ => None,
    };
    let [volume, plugin, volumes, uid, pods] = [name(), name(), name(), name(), name()];
    let known = plugin.is_some_and(|plugin| PLUGINS.contains(&plugin));
    known && volume.is_some() && uid.is_some() && (volumes, pods) == (Some("volumes"), Some("pods"))
}

/// The mirror's name in the guest: the same for all containers of a pod that mount `path`, also after a restart of the daemon.
pub fn name(path: &Path) -> String {
    // However it was written.
    let path: PathBuf = path.components().collect();
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str) -> HostSource {
        HostSource { path: path.into(), access: Access::Readonly, follow_host: false }
    }

    #[test]
    fn the_kubelets_own_volumes_are_known_by_their_paths() {
        for plugin in ["configmap", "secret", "projected", "downward-api"] {
            let path = format!("/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~{plugin}/x");
            assert!(is_mirrored(&source(&path)) && is_mirrored(&source(&format!("{path}/"))), "{path}");
        }
        for other in [
            "/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~empty-dir/x",
            "/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~secret",
            "/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~secret/x/y",
            "/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~secret/..",
            "/var/lib/kubelet/pods/0-1/volume-subpaths/x/main/0",
            "/var/lib/kubelet/0-1/volumes/kubernetes.io~secret/x",
            "/",
        ] {
            assert!(!is_mirrored(&source(other)), "{other}");
        }
    }

    #[test]
    fn one_that_may_be_written_or_follows_the_host_is_shared() {
        let secret = source("/k/pods/u/volumes/kubernetes.io~secret/x");
        assert!(is_mirrored(&HostSource { access: Access::RecursiveReadonly, ..secret.clone() }));
        assert!(!is_mirrored(&HostSource { access: Access::Writable, ..secret.clone() }));
        assert!(!is_mirrored(&HostSource { follow_host: true, ..secret }));
    }

    #[test]
    fn a_name_is_of_one_path_and_fits_the_agent() {
        assert_ne!(name(Path::new("/a")), name(Path::new("/b")));
        assert_eq!(name(Path::new("/a/")), name(Path::new("//a")));
        assert!(name(Path::new("/a")).len() == 32 && name(Path::new("/a")).bytes().all(|b| b.is_ascii_alphanumeric()));
    }
}
