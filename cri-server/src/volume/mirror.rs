//! The kubelet's ConfigMap, Secret, projected and downward-API volumes: kept in the guest's memory rather than shared, so that
//! inotify tells of their changes in a container.
//!
//! Each is a small directory that the kubelet's atomic writer changes as a whole. [`read`] takes it into one message; [`watch`]
//! tells when it has changed; a task of the sandbox's driver (`sandbox/mirrors.rs`) sends it to the agent. What is too large, or
//! has something else than directories, files and links in it, is shared as every other directory of the host is.

pub mod read;
pub mod watch;

use super::kubelet::{self, Part, VolumePath};
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
    match kubelet::parse(&source.path) {
        Some(VolumePath { part: Part::Whole(plugin), .. }) => PLUGINS.contains(&plugin),
        _ => false,
    }
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
}
