//! Counters of the guest and its containers. What the kernel does not give is absent.

mod counters;
mod descriptors;
mod rate;
pub(crate) mod text;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use isopod_proto::agent::{ContainerStats, FilesystemStats, StatsResponse};

use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::layout::Layout;
use crate::reaper::realtime_nanos;

pub use rate::CpuRate;

/// Most entries of a writable layer that are counted; a larger one has no size here.
const MAX_ENTRIES: u64 = 200_000;
/// How deep directories of a writable layer are followed.
const MAX_DEPTH: usize = 256;

/// What is to be read.
pub struct Wanted<'a> {
    /// Of these containers.
    pub containers: &'a [Arc<Container>],
    /// Whether to count descriptors.
    pub descriptors: bool,
    /// The pod's CPU time so far.
    pub pod_rate: &'a CpuRate,
}

/// Everything at once. Blocks.
pub fn collect(layout: &Layout, wanted: &Wanted<'_>) -> StatsResponse {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let swapless = text::meminfo(&memory, "SwapTotal") == Some(0);
    let pod = Cgroup::open(layout.cgroup_parent().to_owned()).ok();
    let containers = wanted.containers.iter();
    StatsResponse {
        containers: containers.map(|container| container_stats(layout, container, wanted, swapless)).collect(),
        interfaces: fs::read_to_string("/proc/net/dev").map(|text| text::interfaces(&text)).unwrap_or_default(),
        memory_total_bytes: text::meminfo(&memory, "MemTotal").unwrap_or(0),
        memory_available_bytes: text::meminfo(&memory, "MemAvailable").unwrap_or(0),
        timestamp_nanos: realtime_nanos(),
        pod: pod.map(|cgroup| counters::read(&cgroup, wanted.pod_rate, swapless)),
    }
}

fn container_stats(layout: &Layout, container: &Container, wanted: &Wanted<'_>, swapless: bool) -> ContainerStats {
    let cgroup = &container.cgroup;
    let scratch = layout.container_scratch(&container.id);
    let layer = disk_usage(&scratch.join("upper"));
    let processes = if wanted.descriptors { cgroup.processes() } else { Vec::new() };
    let descriptors = wanted.descriptors.then(|| descriptors::count(&processes)).flatten();
    ContainerStats {
        id: container.id.clone(),
        timestamp_nanos: realtime_nanos(),
        writable_layer_bytes: layer.map(|(bytes, _)| bytes),
        writable_layer_inodes: layer.map(|(_, inodes)| inodes),
        cgroup: Some(counters::read(cgroup, &container.cpu_rate, swapless)),
        file_descriptors: descriptors.map(|descriptors| descriptors.all),
        sockets: descriptors.map(|descriptors| descriptors.sockets),
        open_files_soft_limit: processes.iter().min().and_then(|process| open_files_limit(*process)),
        filesystem: filesystem(&scratch),
    }
}

/// RLIMIT_NOFILE of a process. A container's oldest, which has the lowest id as ids are far from wrapping, is its first one.
fn open_files_limit(process: i32) -> Option<u64> {
    text::open_files_limit(&fs::read_to_string(format!("/proc/{process}/limits")).ok()?)
}

/// The file system that `path` is on.
fn filesystem(path: &Path) -> Option<FilesystemStats> {
    let device = fs::metadata(path).ok()?.dev();
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(FilesystemStats {
        device: counters::device_name(rustix::fs::major(device), rustix::fs::minor(device)),
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        inodes_total: stat.f_files,
        inodes_free: stat.f_ffree,
    })
}

/// Bytes and inodes of a tree, as du(1) counts them. None if it is too large to count, or is not there.
fn disk_usage(path: &Path) -> Option<(u64, u64)> {
    let mut todo = vec![(path.to_owned(), 0)];
    let (mut bytes, mut inodes) = (fs::symlink_metadata(path).ok()?.blocks() * 512, 1);
    while let Some((directory, depth)) = todo.pop() {
        // The container goes on writing; what has gone in the meantime does not count.
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            inodes += 1;
            bytes += metadata.blocks() * 512;
            if inodes > MAX_ENTRIES || depth > MAX_DEPTH {
                return None;
            }
            if metadata.is_dir() {
                todo.push((entry.path(), depth + 1));
            }
        }
    }
    Some((bytes, inodes))
}

/// Memory of the guest, from /proc/meminfo.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All that the kernel manages.
    pub total: u64,
    /// What could be had without swapping.
    pub available: u64,
}

impl Memory {
    /// The values now.
    pub fn read() -> Self {
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let value = |name| text::meminfo(&text, name).unwrap_or(0);
        Self { total: value("MemTotal"), available: value("MemAvailable") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_counted_with_its_root() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("a")).unwrap();
        fs::write(directory.path().join("a/b"), [0; 10_000]).unwrap();
        let (bytes, inodes) = disk_usage(directory.path()).unwrap();
        assert!(bytes >= 10_000 && inodes == 3);
        assert_eq!(disk_usage(&directory.path().join("missing")), None);
    }

    #[test]
    fn a_file_system_is_told_with_its_size() {
        let directory = tempfile::tempdir().unwrap();
        let found = filesystem(directory.path()).unwrap();
        assert!(found.total_bytes >= found.available_bytes && found.inodes_total >= found.inodes_free);
        assert!(found.total_bytes > 0);
        assert_eq!(filesystem(&directory.path().join("missing")), None);
    }
}
