//! Counters of the guest and its containers. What the kernel does not give is absent.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use isopod_proto::agent::{ContainerStats, InterfaceStats, StatsResponse};

use crate::container::Container;
use crate::layout::Layout;
use crate::reaper::realtime_nanos;

/// Most entries of a writable layer that are counted; a larger one has no size here.
const MAX_ENTRIES: u64 = 200_000;
/// How deep directories of a writable layer are followed.
const MAX_DEPTH: usize = 256;

/// Everything at once. Blocks.
pub fn collect(layout: &Layout, containers: &[Arc<Container>]) -> StatsResponse {
    let memory = Memory::read();
    StatsResponse {
        containers: containers.iter().map(|container| container_stats(layout, container)).collect(),
        interfaces: fs::read_to_string("/proc/net/dev").map(|text| interfaces(&text)).unwrap_or_default(),
        memory_total_bytes: memory.total,
        memory_available_bytes: memory.available,
    }
}

fn container_stats(layout: &Layout, container: &Container) -> ContainerStats {
    let cgroup = &container.cgroup;
    let memory = |key| cgroup.keyed_number("memory.stat", key);
    let usage = cgroup.number("memory.current");
    let inactive = memory("inactive_file");
    let layer = disk_usage(&layout.container_scratch(&container.id).join("upper"));
    ContainerStats {
        id: container.id.clone(),
        timestamp_nanos: realtime_nanos(),
        cpu_usage_micros: cgroup.keyed_number("cpu.stat", "usage_usec"),
        memory_usage_bytes: usage,
        memory_working_set_bytes: usage.zip(inactive).map(|(usage, inactive)| usage.saturating_sub(inactive)),
        memory_rss_bytes: memory("anon"),
        page_faults: memory("pgfault"),
        major_page_faults: memory("pgmajfault"),
        writable_layer_bytes: layer.map(|(bytes, _)| bytes),
        writable_layer_inodes: layer.map(|(_, inodes)| inodes),
        pids: cgroup.number("pids.current"),
    }
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

/// The lines of /proc/net/dev after its two of heading: name, eight counters received, eight sent.
fn interfaces(text: &str) -> Vec<InterfaceStats> {
    let line = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        let at = |index: usize| counters.get(index).copied();
        Some(InterfaceStats {
            name: name.trim().into(),
            rx_bytes: at(0)?,
            rx_errors: at(2)?,
            tx_bytes: at(8)?,
            tx_errors: at(10)?,
        })
    };
    text.lines().skip(2).filter_map(line).filter(|interface| interface.name != "lo").collect()
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
        Self::parse(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let value = |wanted: &str| -> u64 {
            let mut lines = text.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(name, _)| *name == wanted);
            let kib = found.and_then(|(_, value)| value.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            kib.unwrap_or(0) * 1024
        };
        Self { total: value("MemTotal"), available: value("MemAvailable") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_counters_are_read_by_column() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
                    eth0: 100 2 3 4 5 6 7 8 900 10 11 12 13 14 15 16\nbroken: 1 2\n";
        let expected =
            InterfaceStats { name: "eth0".into(), rx_bytes: 100, rx_errors: 3, tx_bytes: 900, tx_errors: 11 };
        assert_eq!(interfaces(text), [expected]);
    }

    #[test]
    fn meminfo_is_in_bytes() {
        let memory = Memory::parse("MemTotal:        1024 kB\nMemFree: 1 kB\nMemAvailable:   512 kB\n");
        assert_eq!(memory, Memory { total: 1 << 20, available: 1 << 19 });
    }

    #[test]
    fn a_tree_is_counted_with_its_root() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("a")).unwrap();
        fs::write(directory.path().join("a/b"), [0; 10_000]).unwrap();
        let (bytes, inodes) = disk_usage(directory.path()).unwrap();
        assert!(bytes >= 10_000 && inodes == 3);
        assert_eq!(disk_usage(&directory.path().join("missing")), None);
    }
}
