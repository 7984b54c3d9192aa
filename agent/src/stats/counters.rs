//! The counters and limits of one cgroup.

use std::fs;
use std::time::Instant;

use isopod_proto::agent::{BlockDeviceStats, CgroupStats, HugePageStats, Pressure};

use super::rate::CpuRate;
use super::text::{self, Keyed};
use crate::cgroup::Cgroup;

/// Page sizes of x86-64, as the files of the hugetlb controller name them.
const HUGE_PAGES: [&str; 2] = ["2MB", "1GB"];

/// All of them. `swapless`: the guest has no swap, so nobody uses any. Blocks.
pub fn read(cgroup: &Cgroup, rate: &CpuRate, swapless: bool) -> CgroupStats {
    let read = |file| cgroup.read(file).ok();
    let limit = |file| read(file).and_then(|text| text::limit(&text));
    let pressure = |file| -> Option<Pressure> { text::pressure(&read(file)?) };
    let keyed = |file| Keyed::new(read(file).unwrap_or_default());
    let (cpu, memory, events) = (keyed("cpu.stat"), keyed("memory.stat"), keyed("memory.events"));
    let (cpu_quota_micros, cpu_period_micros) = text::cpu_max(&read("cpu.max").unwrap_or_default());
    let (usage, inactive) = (cgroup.number("memory.current"), memory.number("inactive_file"));
    let cpu_usage_micros = cpu.number("usage_usec");
    CgroupStats {
        cpu_usage_micros,
        cpu_user_micros: cpu.number("user_usec"),
        cpu_system_micros: cpu.number("system_usec"),
        cpu_periods: cpu.number("nr_periods"),
        cpu_throttled_periods: cpu.number("nr_throttled"),
        cpu_throttled_micros: cpu.number("throttled_usec"),
        cpu_nano_cores: cpu_usage_micros.and_then(|micros| rate.observe(micros, Instant::now())),
        cpu_weight: cgroup.number("cpu.weight"),
        cpu_quota_micros,
        cpu_period_micros,
        cpu_pressure: pressure("cpu.pressure"),
        memory_usage_bytes: usage,
        memory_peak_bytes: cgroup.number("memory.peak"),
        memory_working_set_bytes: usage.zip(inactive).map(|(usage, inactive)| usage.saturating_sub(inactive)),
        memory_anon_bytes: memory.number("anon"),
        memory_file_bytes: memory.number("file"),
        memory_mapped_bytes: memory.number("file_mapped"),
        memory_kernel_bytes: memory.number("kernel"),
        page_faults: memory.number("pgfault"),
        major_page_faults: memory.number("pgmajfault"),
        memory_limit_hits: events.number("max"),
        oom_kills: events.number("oom_kill"),
        memory_limit_bytes: limit("memory.max"),
        memory_low_bytes: limit("memory.low"),
        swap_usage_bytes: cgroup.number("memory.swap.current").or(swapless.then_some(0)),
        swap_limit_bytes: limit("memory.swap.max").or(swapless.then_some(0)),
        memory_pressure: pressure("memory.pressure"),
        threads: cgroup.number("pids.current"),
        threads_limit: limit("pids.max"),
        processes: Some(cgroup.processes().len() as u64),
        devices: devices(&read("io.stat").unwrap_or_default()),
        io_pressure: pressure("io.pressure"),
        huge_pages: HUGE_PAGES.iter().filter_map(|size| huge_pages(cgroup, size)).collect(),
    }
}

fn huge_pages(cgroup: &Cgroup, size: &str) -> Option<HugePageStats> {
    let usage_bytes = cgroup.number(&format!("hugetlb.{size}.current"))?;
    Some(HugePageStats { size: size.to_owned(), usage_bytes })
}

fn devices(text: &str) -> Vec<BlockDeviceStats> {
    let with_name = |line: text::DeviceLine| BlockDeviceStats {
        major: line.major,
        minor: line.minor,
        name: device_name(line.major, line.minor),
        read_bytes: line.read_bytes,
        written_bytes: line.written_bytes,
        reads: line.reads,
        writes: line.writes,
    };
    text::device_lines(text).into_iter().map(with_name).collect()
}

/// The kernel's name of a block device; empty if there is none.
pub fn device_name(major: u32, minor: u32) -> String {
    let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).unwrap_or_default();
    text::device_name(&uevent).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_does_not_give_is_absent() {
        let (_directory, cgroup) = Cgroup::of_files(&[]);
        let stats = read(&cgroup, &CpuRate::default(), false);
        assert_eq!(stats, CgroupStats { processes: Some(0), ..CgroupStats::default() });
    }

    #[test]
    fn no_swap_is_known_not_to_be_used() {
        let (_directory, cgroup) = Cgroup::of_files(&[]);
        let stats = read(&cgroup, &CpuRate::default(), true);
        assert_eq!((stats.swap_usage_bytes, stats.swap_limit_bytes), (Some(0), Some(0)));
    }

    #[test]
    fn every_file_has_its_fields() {
        let (_directory, cgroup) = Cgroup::of_files(&[
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 3\nnr_throttled 2\nthrottled_usec 1\n",
            ),
            ("cpu.weight", "39\n"),
            ("cpu.max", "20000 100000\n"),
            ("memory.current", "1000\n"),
            ("memory.max", "max\n"),
            (
                "memory.stat",
                "anon 400\nfile 500\nkernel 90\nfile_mapped 50\ninactive_file 300\npgfault 7\npgmajfault 1\n",
            ),
            ("memory.events", "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n"),
            ("memory.swap.current", "64\n"),
            ("pids.current", "4\n"),
            ("pids.max", "100\n"),
            ("cgroup.procs", "1\n2\n"),
            ("hugetlb.2MB.current", "0\n"),
            ("io.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=9\n"),
        ]);
        let stats = read(&cgroup, &CpuRate::default(), false);
        assert_eq!((stats.cpu_usage_micros, stats.cpu_throttled_micros), (Some(30), Some(1)));
        assert_eq!(
            (stats.cpu_quota_micros, stats.cpu_period_micros, stats.cpu_weight),
            (Some(20_000), Some(100_000), Some(39))
        );
        assert_eq!((stats.memory_working_set_bytes, stats.memory_kernel_bytes), (Some(700), Some(90)));
        assert_eq!((stats.memory_limit_hits, stats.oom_kills, stats.memory_limit_bytes), (Some(5), Some(1), Some(-1)));
        assert_eq!((stats.swap_usage_bytes, stats.swap_limit_bytes), (Some(64), None));
        assert_eq!((stats.threads, stats.threads_limit, stats.processes), (Some(4), Some(100), Some(2)));
        assert_eq!(stats.huge_pages, [HugePageStats { size: "2MB".into(), usage_bytes: 0 }]);
        assert_eq!(stats.io_pressure.unwrap().some.unwrap().total_micros, 9);
        assert_eq!((stats.cpu_pressure, stats.memory_peak_bytes), (None, None));
    }
}
