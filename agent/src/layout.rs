//! Where the agent keeps things in the guest.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The agent's directories.
#[derive(Clone, Debug)]
pub struct Layout {
    run: PathBuf,
    cgroup_parent: PathBuf,
}

impl Layout {
    /// In a guest, where the agent is process 1.
    pub fn guest() -> Self {
        Self::new("/run/isopod", "/sys/fs/cgroup/pod")
    }

    /// Elsewhere: `run` is a directory of the agent's own, `cgroup_parent` the cgroup that containers' cgroups go into.
    pub fn new(run: impl Into<PathBuf>, cgroup_parent: impl Into<PathBuf>) -> Self {
        Self { run: run.into(), cgroup_parent: cgroup_parent.into() }
    }

    /// The cgroup that has one child for each container.
    pub fn cgroup_parent(&self) -> &Path {
        &self.cgroup_parent
    }

    /// Where the disk `id`, an image, is mounted.
    pub fn disk(&self, id: &str) -> PathBuf {
        self.run.join("disks").join(id)
    }

    /// The pod's scratch file system.
    pub fn scratch(&self) -> PathBuf {
        self.run.join("scratch")
    }

    /// The upper and work directories of a container.
    pub fn container_scratch(&self, id: &str) -> PathBuf {
        self.scratch().join("containers").join(id)
    }

    /// Where the pod's volume `name` is mounted.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.run.join("volumes").join(name)
    }

    /// The files a container was given with its creation.
    pub fn container_files(&self, id: &str) -> PathBuf {
        self.run.join("containers").join(id)
    }

    /// The pod's hostname, hosts or resolv.conf.
    pub fn pod_file(&self, name: &str) -> PathBuf {
        self.run.join("pod").join(name)
    }

    /// The pod's /dev/shm.
    pub fn shm(&self) -> PathBuf {
        self.run.join("shm")
    }

    /// Where the file system is mounted whose root has what the host shares with the pod.
    pub fn shares(&self) -> PathBuf {
        self.run.join("shares")
    }

    /// Where the mirror `name` is mounted.
    pub fn mirror(&self, name: &str) -> PathBuf {
        self.run.join("mirrors").join(name)
    }

    /// Where each stub, in its own mount namespace, mounts what becomes its root.
    pub fn mount_point(&self) -> PathBuf {
        self.run.join("root")
    }

    /// Every directory that has to be there before anything else.
    pub fn directories(&self) -> Vec<PathBuf> {
        ["disks", "scratch", "containers", "pod", "shm", "shares", "mirrors", "volumes", "root"]
            .map(|name| self.run.join(name))
            .to_vec()
    }
}

/// Refuses what is not the name of a `what`: 1 to 64 ASCII letters and digits, which is one component of a path.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    if (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(Error::invalid(format!("{shown:?} is not the name of a {what}")))
}
