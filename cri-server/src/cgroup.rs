//! The host cgroup of a sandbox's VMM: `<cgroup_parent or /isopod>/isopod-<id>` in the v2 hierarchy.

use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use isopod_proto::{ErrorKind, ObjectId};

use crate::cpu_set::CpuSet;

/// Where sandboxes go whose config names no parent.
const DEFAULT_PARENT: &str = "/isopod";

/// A cgroup that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup v2.
    #[error("no cgroup v2 hierarchy is mounted")]
    NoHierarchy,
    /// The sandbox config's parent is no path in the hierarchy.
    #[error("cgroup_parent {parent:?} is not an absolute path without \"..\"")]
    BadParent {
        /// What was given.
        parent: String,
    },
    /// The kernel does not take a set of CPUs or memory nodes.
    #[error("cannot set {file} of cgroup {path} to {list:?}")]
    Restrict {
        /// The file of the cgroup.
        file: &'static str,
        /// What was written.
        list: String,
        /// Of which cgroup.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file system call failed.
    #[error("cannot {doing} cgroup {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which cgroup.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoHierarchy => ErrorKind::FailedPrecondition,
            Self::BadParent { .. } => ErrorKind::InvalidArgument,
            Self::Restrict { .. } => ErrorKind::FailedPrecondition,
            Self::Io { .. } => ErrorKind::Internal,
        }
    }
}

/// Where the cgroup v2 hierarchy is mounted.
pub fn root() -> Option<PathBuf> {
    mounted(&std::fs::read_to_string("/proc/self/mounts").ok()?)
}

fn mounted(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| target.into())
    })
}

/// The cgroup's path below the hierarchy's root.
pub fn path_of(parent: &str, id: &ObjectId) -> Result<PathBuf, CgroupError> {
    let parent = if parent.is_empty() { DEFAULT_PARENT } else { parent };
    let mut components = Path::new(parent).components();
    let absolute = components.next() == Some(Component::RootDir);
    if !absolute || !components.clone().all(|component| matches!(component, Component::Normal(_))) {
        return Err(CgroupError::BadParent { parent: parent.chars().take(200).collect() });
    }
    Ok(components.as_path().join(format!("isopod-{id}")))
}

/// The cgroup's directory, which need not exist.
pub fn directory(parent: &str, id: &ObjectId) -> Result<PathBuf, CgroupError> {
    let relative = path_of(parent, id)?;
    Ok(root().ok_or(CgroupError::NoHierarchy)?.join(relative))
}

/// Makes the cgroup at `path`, and its parents where there are none.
pub fn make(path: &Path) -> Result<(), CgroupError> {
    std::fs::create_dir_all(path).map_err(|source| CgroupError::Io { doing: "make", path: path.into(), source })
}

/// The cgroups of sandboxes below `hierarchy`'s default parent that none of `known` has.
fn orphans_below(hierarchy: &Path, known: &[ObjectId]) -> Vec<PathBuf> {
    let parent = hierarchy.join(DEFAULT_PARENT.trim_start_matches('/'));
    let is_orphan = |name: &str| {
        let id = name.strip_prefix("isopod-").and_then(|id| ObjectId::parse(id).ok());
        id.is_some_and(|id| !known.contains(&id))
    };
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_str().is_some_and(is_orphan)).map(|entry| entry.path()).collect()
}

/// Removes cgroups of sandboxes below the default parent that none of `known` has. Those below other parents go with them.
pub async fn remove_orphans(known: &[ObjectId]) -> Result<(), CgroupError> {
    for path in root().map(|root| orphans_below(&root, known)).unwrap_or_default() {
        tracing::info!(cgroup = %path.display(), "removing a cgroup that no sandbox has");
        remove(&path).await?;
    }
    Ok(())
}

/// Moves the process `pid` into the cgroup at `path`.
pub fn enter(path: &Path, pid: i32) -> Result<(), CgroupError> {
    std::fs::write(path.join("cgroup.procs"), pid.to_string()).map_err(|source| CgroupError::Io {
        doing: "move the VMM into",
        path: path.into(),
        source,
    })
}

/// What of the host the processes of a cgroup may use; none: all that its parent may.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuSets {
    /// CPUs.
    pub cpus: Option<CpuSet>,
    /// Memory nodes.
    pub mems: Option<CpuSet>,
}

/// Restricts the cgroup at `path` to `sets`. After an error some of them may be in force.
pub fn restrict(path: &Path, sets: &CpuSets) -> Result<(), CgroupError> {
    let read = |directory: &Path, file: &str| std::fs::read_to_string(directory.join(file)).unwrap_or_default();
    if sets.cpus.is_some() || sets.mems.is_some() {
        delegate_cpuset(path)?;
    }
    for (file, set) in [("cpuset.cpus", &sets.cpus), ("cpuset.mems", &sets.mems)] {
        let list = match (set, path.parent()) {
            (Some(set), _) => set.to_string(),
            // One that was restricted cannot be made to say nothing any more: it gets what its parent has.
            (None, Some(parent)) if !read(path, file).trim().is_empty() => read(parent, &format!("{file}.effective")),
            (None, _) => continue,
        };
        std::fs::write(path.join(file), &list).map_err(|source| CgroupError::Restrict {
            file,
            list,
            path: path.into(),
            source,
        })?;
    }
    Ok(())
}

/// Lets the cgroups above `path` pass the cpuset controller on to it, as far as they do not.
fn delegate_cpuset(path: &Path) -> Result<(), CgroupError> {
    let above: Vec<&Path> = path.ancestors().skip(1).take_while(|above| above.join("cgroup.procs").exists()).collect();
    for above in above.into_iter().rev() {
        let file = above.join("cgroup.subtree_control");
        let failed =
            |source| CgroupError::Io { doing: "pass the cpuset controller on from", path: above.into(), source };
        let passed = std::fs::read_to_string(&file).map_err(failed)?;
        if !passed.split_whitespace().any(|controller| controller == "cpuset") {
            std::fs::write(&file, "+cpuset").map_err(failed)?;
        }
    }
    Ok(())
}

/// Removes the cgroup. Its last process may just have ended, which takes the kernel a moment to notice.
pub async fn remove(path: &Path) -> Result<(), CgroupError> {
    let mut attempts = 0;
    loop {
        match std::fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && attempts < 50 => attempts += 1,
            Err(source) => return Err(CgroupError::Io { doing: "remove", path: path.into(), source }),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> ObjectId {
        ObjectId::from_random([0xab; 32])
    }

    #[test]
    fn the_hierarchy_is_found_among_the_mounts() {
        let mounts =
            "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(mounted(mounts), Some("/sys/fs/cgroup".into()));
        assert_eq!(mounted("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn a_sandbox_is_below_its_parent() {
        let path = path_of("/kubepods/burstable/pod1", &id()).expect("a good parent");
        assert_eq!(path, PathBuf::from(format!("kubepods/burstable/pod1/isopod-{}", id())));
        assert!(path_of("", &id()).expect("the default").starts_with("isopod"));
    }

    #[test]
    fn only_cgroups_of_unknown_sandboxes_are_orphans() {
        let hierarchy = tempfile::tempdir().expect("a directory");
        let other = ObjectId::from_random([1; 32]);
        for name in [format!("isopod/isopod-{}", id()), format!("isopod/isopod-{other}"), "isopod/isopod-x".into()] {
            std::fs::create_dir_all(hierarchy.path().join(name)).expect("made");
        }
        let expected = hierarchy.path().join(format!("isopod/isopod-{other}"));
        assert_eq!(orphans_below(hierarchy.path(), &[id()]), [expected]);
        assert!(orphans_below(Path::new("/nowhere"), &[]).is_empty());
    }

    #[test]
    fn a_restriction_is_lifted_to_what_the_parent_has() {
        let parent = tempfile::tempdir().expect("a directory");
        let path = parent.path().join("pod");
        std::fs::create_dir(&path).expect("made");
        for (file, text) in
            [("cgroup.procs", ""), ("cgroup.subtree_control", "cpu\n"), ("cpuset.cpus.effective", "0-3\n")]
        {
            std::fs::write(parent.path().join(file), text).expect("written");
        }
        let read = |path: &Path, file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
        restrict(&path, &CpuSets::default()).expect("nothing to do");
        assert_eq!(read(parent.path(), "cgroup.subtree_control"), "cpu\n");
        let sets = CpuSets { cpus: CpuSet::parse("1-2"), mems: None };
        restrict(&path, &sets).expect("restricted");
        assert_eq!((read(&path, "cpuset.cpus").as_str(), path.join("cpuset.mems").exists()), ("1-2", false));
        assert_eq!(read(parent.path(), "cgroup.subtree_control"), "+cpuset");
        restrict(&path, &CpuSets::default()).expect("lifted");
        assert_eq!(read(&path, "cpuset.cpus").trim(), "0-3");
    }

    #[test]
    fn a_parent_outside_the_hierarchy_is_refused() {
        for bad in ["relative", "/a/../../etc", ".."] {
            assert!(matches!(path_of(bad, &id()), Err(CgroupError::BadParent { .. })), "{bad}");
        }
    }
}
