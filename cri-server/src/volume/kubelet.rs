//! Where the kubelet keeps the volumes of its pods.

use std::path::{Component, Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// A path of the kubelet's that belongs to a volume.
#[derive(Debug, PartialEq, Eq)]
pub struct VolumePath<'p> {
    /// The directory that has one of each pod, by its uid.
    pub pods: PathBuf,
    /// The pod's uid.
    pub uid: &'p str,
    /// The volume's name.
    pub volume: &'p str,
    /// What of it.
    pub part: Part<'p>,
}

/// What of a volume a path is.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'p> {
    /// All, at `<pods>/<uid>/volumes/<plugin>/<volume>`; the plugin.
    Whole(&'p str),
    /// A sub-path, which the kubelet has mounted at `<pods>/<uid>/volume-subpaths/<volume>/<container>/<number>`.
    SubPath,
}

/// What `path` is, if it is one of these.
pub fn parse(path: &Path) -> Option<VolumePath<'_>> {
    let mut names = Vec::new();
    let mut rest = path.components();
    while names.len() < 6 {
        match rest.next_back() {
            Some(Component::Normal(name)) => names.push(name.to_str()?),
            _ => break,
        }
    }
    let of = |depth: usize, uid, volume, part| {
        let pods = path.components().collect::<PathBuf>().ancestors().nth(depth)?.to_owned();
        Some(VolumePath { pods, uid, volume, part })
    };
    match names[..] {
        [volume, plugin, "volumes", uid, "pods", ..] => of(4, uid, volume, Part::Whole(plugin)),
        [_, _, volume, "volume-subpaths", uid, "pods"] => of(5, uid, volume, Part::SubPath),
        _ => None,
    }
}

/// The name in the guest of the volume at `path`: the same for all containers of a pod that mount it, also after a restart of the
/// daemon. 32 hexadecimal digits.
pub fn guest_name(path: &Path) -> String {
    // However it was written.
    let path: PathBuf = path.components().collect();
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_and_sub_paths_are_known_by_their_place() {
        let of = |path: &'static str| parse(Path::new(path));
        let pods = PathBuf::from("/var/lib/kubelet/pods");
        let whole =
            VolumePath { pods: pods.clone(), uid: "0-1", volume: "x", part: Part::Whole("kubernetes.io~secret") };
        assert_eq!(of("/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~secret/x"), Some(whole));
        let part = VolumePath { pods, uid: "0-1", volume: "x", part: Part::SubPath };
        assert_eq!(of("/var/lib/kubelet//pods/0-1/volume-subpaths/x/main/0/"), Some(part));
        for other in [
            "/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~secret",
            "/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~secret/x/y",
            "/var/lib/kubelet/pods/0-1/volumes/kubernetes.io~secret/..",
            "/var/lib/kubelet/pods/0-1/volume-subpaths/x/main",
            "/var/lib/kubelet/0-1/volumes/kubernetes.io~secret/x",
            "/",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn a_name_is_of_one_path_and_fits_the_agent() {
        let name = |path: &str| guest_name(Path::new(path));
        assert_ne!(name("/a"), name("/b"));
        assert_eq!(name("/a/"), name("//a"));
        assert!(name("/a").len() == 32 && name("/a").bytes().all(|b| b.is_ascii_alphanumeric()));
    }
}
