//! The host cgroup of a sandbox's VMM in the v2 hierarchy, below what the sandbox's config names as its parent: a directory
//! `isopod-<id>`, or, where systemd is to know of it, a scope `isopod-<id>.scope`. The name tells which it is.

use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use isopod_proto::{ErrorKind, ObjectId};
use serde::{Deserialize, Serialize};

use crate::cpu_set::CpuSet;

mod scope;

/// Where sandboxes go whose config names no parent.
const DEFAULT_PARENT: &str = "/isopod";
const DEFAULT_SLICE: &str = "isopod.slice";

/// Who makes the cgroups of sandboxes. The kubelet asks, and does the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// isopod.
    Cgroupfs,
    /// systemd, at isopod's wish.
    Systemd,
}

impl Driver {
    /// systemd where it is this machine's init (sd_booted(3)): a hierarchy has one writer.
    pub fn of_host() -> Self {
        if Path::new("/run/systemd/system").is_dir() { Self::Systemd } else { Self::Cgroupfs }
    }
}

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
    /// The sandbox config's parent is no slice.
    #[error("cgroup_parent {parent:?} is not a slice of systemd, or its path, as cgroup_driver \"systemd\" has it")]
    NoSlice {
        /// What was given.
        parent: String,
    },
    /// systemd does not do it.
    #[error("systemd cannot {doing} {unit}")]
    Systemd {
        /// What was tried.
        doing: &'static str,
        /// With which unit.
        unit: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
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
    /// A controller is not to be had.
    #[error("cannot pass the {controller} controller on from cgroup {path}")]
    PassOn {
        /// Which.
        controller: &'static str,
        /// The cgroup that should.
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
            Self::BadParent { .. } | Self::NoSlice { .. } => ErrorKind::InvalidArgument,
            Self::Restrict { .. } | Self::Systemd { .. } => ErrorKind::FailedPrecondition,
            Self::PassOn { .. } | Self::Io { .. } => ErrorKind::Internal,
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
fn path_of(driver: Driver, parent: &str, id: &ObjectId) -> Result<PathBuf, CgroupError> {
    match driver {
        Driver::Cgroupfs => directory_below(parent, id),
        Driver::Systemd => {
            let slice = scope::slice(if parent.is_empty() { DEFAULT_SLICE } else { parent });
            let slice = slice.ok_or_else(|| CgroupError::NoSlice { parent: shown(parent) })?;
            Ok(slice.join(format!("isopod-{id}.scope")))
        }
    }
}

/// What of a parent that may be anything is shown.
fn shown(parent: &str) -> String {
    parent.chars().take(200).collect()
}

fn directory_below(parent: &str, id: &ObjectId) -> Result<PathBuf, CgroupError> {
    let parent = if parent.is_empty() { DEFAULT_PARENT } else { parent };
    let mut components = Path::new(parent).components();
    let absolute = components.next() == Some(Component::RootDir);
    if !absolute || !components.clone().all(|component| matches!(component, Component::Normal(_))) {
        return Err(CgroupError::BadParent { parent: shown(parent) });
    }
    Ok(components.as_path().join(format!("isopod-{id}")))
}

/// The cgroup's directory, which need not exist.
pub fn directory(driver: Driver, parent: &str, id: &ObjectId) -> Result<PathBuf, CgroupError> {
    let relative = path_of(driver, parent, id)?;
    Ok(root().ok_or(CgroupError::NoHierarchy)?.join(relative))
}

/// Makes the cgroup at `path`, and its parents where there are none, with the process `pid` as its first.
pub async fn make(path: &Path, pid: i32) -> Result<(), CgroupError> {
    if let Some(unit) = scope::unit(path) {
        return scope::start(unit, path, pid).await;
    }
    std::fs::create_dir_all(path).map_err(|source| CgroupError::Io { doing: "make", path: path.into(), source })?;
    // For memory.events. Without the controller nothing of it has a limit.
    if let Err(error) = pass_on("memory", path) {
        tracing::warn!(error = crate::grpc::status::chain(&error), "a kill for want of memory will not be seen");
    }
    enter(path, pid)
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

/// Removes cgroups of sandboxes below the default parent that none of `known` has. Those below other parents go with them, and
/// scopes with their last process.
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
        doing: "move a process into",
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

/// Whether the kernel has killed a process of the cgroup at `path` for want of memory (cgroup-v2.rst, `memory.events`). None: it is
/// gone, as a scope may be with its last process.
pub fn oom_killed(path: &Path) -> Option<bool> {
    let events = std::fs::read_to_string(path.join("memory.events")).ok()?;
    Some(events.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0"))
}

/// Restricts the cgroup at `path` to `sets`. After an error some of them may be in force.
pub async fn restrict(path: &Path, sets: &CpuSets) -> Result<(), CgroupError> {
    let sets = &CpuSets {
        cpus: sets.cpus.clone().or_else(|| lifted(path, "cpuset.cpus")),
        mems: sets.mems.clone().or_else(|| lifted(path, "cpuset.mems")),
    };
    match scope::unit(path) {
        Some(unit) => scope::restrict(unit, path, sets).await,
        None => restrict_directory(path, sets),
    }
}

/// One that was restricted cannot be made to say nothing any more: it gets what its parent has.
fn lifted(path: &Path, file: &str) -> Option<CpuSet> {
    let restricted = std::fs::read_to_string(path.join(file)).is_ok_and(|list| !list.trim().is_empty());
    let parent = path.parent().filter(|_| restricted)?;
    CpuSet::parse(&std::fs::read_to_string(parent.join(format!("{file}.effective"))).ok()?)
}

fn restrict_directory(path: &Path, sets: &CpuSets) -> Result<(), CgroupError> {
    if sets.cpus.is_some() || sets.mems.is_some() {
        pass_on("cpuset", path)?;
    }
    for (file, set) in [("cpuset.cpus", &sets.cpus), ("cpuset.mems", &sets.mems)] {
        let Some(list) = set.as_ref().map(CpuSet::to_string) else { continue };
        std::fs::write(path.join(file), &list).map_err(|source| CgroupError::Restrict {
            file,
            list,
            path: path.into(),
            source,
        })?;
    }
    Ok(())
}

/// Lets the cgroups above `path` pass a controller on to it, as far as they do not.
fn pass_on(controller: &'static str, path: &Path) -> Result<(), CgroupError> {
    let above: Vec<&Path> = path.ancestors().skip(1).take_while(|above| above.join("cgroup.procs").exists()).collect();
    for above in above.into_iter().rev() {
        let file = above.join("cgroup.subtree_control");
        let failed = |source| CgroupError::PassOn { controller, path: above.into(), source };
        let passed = std::fs::read_to_string(&file).map_err(failed)?;
        if !passed.split_whitespace().any(|passed| passed == controller) {
            std::fs::write(&file, format!("+{controller}")).map_err(failed)?;
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
mod tests;
