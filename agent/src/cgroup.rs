//! cgroup v2 of a container (Documentation/admin-guide/cgroup-v2.rst of the kernel).

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use isopod_proto::ErrorKind;
use isopod_proto::agent::Resources;

use crate::error::{Context as _, Error, Result};

/// How long the processes of a killed cgroup may take to be gone.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(30);

/// How often memory is reclaimed for a lower limit before that is refused.
const RECLAIM_TRIES: u32 = 3;

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

/// A cgroup file and what is to be written to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    file: String,
    value: String,
    /// The file may be missing: the kernel has no swap, or the value is what the kernel does anyway.
    optional: bool,
}

impl Cgroup {
    /// Makes the cgroup `name` below `parent`.
    pub fn create(parent: &Path, name: &str) -> Result<Self> {
        let path = parent.join(name);
        fs::create_dir(&path).context(|| format!("make the cgroup {}", path.display()))?;
        Self::open(path)
    }

    /// The cgroup at `path`.
    pub fn open(path: PathBuf) -> Result<Self> {
        let directory = fs::File::open(&path).context(|| format!("open the cgroup {}", path.display()))?.into();
        Ok(Self { path, directory })
    }

    /// Makes a cgroup below this one for some of its processes. It has no limits of its own: no controller is passed on, so that
    /// both may hold processes ("No Internal Process Constraint").
    pub fn create_child(&self, name: &str) -> Result<Self> {
        Self::create(&self.path, name)
    }

    /// Removes it if nothing is in it; otherwise it stays until what is around it is removed.
    pub fn remove_if_empty(&self) {
        // A command may leave processes behind, as daemons do; they live as long as the container.
        let _ = fs::remove_dir(&self.path);
    }

    /// A copy of the directory's descriptor, for CLONE_INTO_CGROUP.
    pub fn clone_directory(&self) -> Result<OwnedFd> {
        self.directory.try_clone().context(|| "duplicate a cgroup's descriptor")
    }

    /// The contents of one of its files.
    pub fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path.join(file))
    }

    /// The number in a file that holds one number.
    pub fn number(&self, file: &str) -> Option<u64> {
        self.read(file).ok()?.trim().parse().ok()
    }

    /// The number after `key` in a file of "key number" lines.
    fn keyed_number(&self, file: &str, key: &str) -> Option<u64> {
        keyed(&self.read(file).ok()?, key)
    }

    /// How many of its processes the OOM killer has killed.
    pub fn oom_kills(&self) -> u64 {
        self.keyed_number("memory.events", "oom_kill").unwrap_or(0)
    }

    /// Writes `settings`; if one is refused, those before it get their old values back.
    pub fn apply(&self, settings: &[Setting]) -> Result<()> {
        let mut old: Vec<(&str, String)> = Vec::new();
        for Setting { file, value, optional } in settings {
            let path = self.path.join(file);
            let before = fs::read_to_string(&path);
            match write_existing(&path, value) {
                Ok(()) => old.extend(before.ok().map(|value| (file.as_str(), value))),
                Err(error) if *optional && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    for (file, value) in old.iter().rev() {
                        // The values were in force a moment ago; if one is refused now there is no better one.
                        let _ = fs::write(self.path.join(file), value.trim());
                    }
                    let refused = matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound);
                    let error = Error::io(format!("write {value:?} to the container's {file}"), error);
                    return Err(if refused { error.with_kind(ErrorKind::InvalidArgument) } else { error });
                }
            }
        }
        Ok(())
    }

    /// As [`Self::apply`], for a cgroup that is in use. The kernel takes a memory limit below what is in use and makes room
    /// with the OOM killer; here that is an error, and what can be reclaimed is reclaimed first. Blocks.
    pub fn update(&self, settings: &[Setting]) -> Result<()> {
        let limit = settings.iter().rev().find(|setting| setting.file == "memory.max");
        if let Some(limit) = limit.and_then(|setting| setting.value.trim().parse().ok()) {
            self.make_room(limit)?;
        }
        self.apply(settings)
    }

    /// Reclaims memory until no more than `limit` bytes are in use.
    fn make_room(&self, limit: u64) -> Result<()> {
        let used = || self.number("memory.current").unwrap_or(0);
        for _ in 0..RECLAIM_TRIES {
            let excess = used().saturating_sub(limit);
            if excess == 0 {
                return Ok(());
            }
            // It fails if less was to be had, which the next look at what is used tells as well.
            let _ = fs::write(self.path.join("memory.reclaim"), excess.to_string());
        }
        match used() {
            used if used > limit => {
                Err(Error::precondition(format!("the memory limit {limit} is below the {used} bytes in use")))
            }
            _ => Ok(()),
        }
    }

    /// Kills every process in it, also those that come to be meanwhile.
    pub fn kill(&self) {
        // It fails only if the cgroup is gone, and its processes with it.
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
    }

    /// The process ids in it and below it, as the agent's PID namespace has them.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        collect_processes(&self.path, 0, &mut found);
        found
    }

    /// Kills what is left in it and removes it, with what the container made below it. Blocks.
    pub fn remove(&self) -> Result<()> {
        let deadline = Instant::now() + EMPTY_TIMEOUT;
        let mut pause = Duration::from_millis(1);
        loop {
            self.kill();
            match remove_tree(&self.path, 0) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                result => return result.context(|| format!("remove the cgroup {}", self.path.display())),
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }
}

/// How deep a container may nest cgroups for its removal to be tried.
const MAX_DEPTH: u32 = 64;

/// Writes to a file that is there. The kernel refuses to make one, in words that do not tell that it is missing.
fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).truncate(true).open(path)?.write_all(value.as_bytes())
}

fn collect_processes(path: &Path, depth: u32, found: &mut Vec<i32>) {
    // What cannot be read has gone, and its processes with it.
    let list = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    found.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
    let Ok(entries) = fs::read_dir(path) else { return };
    for entry in entries.flatten() {
        if depth < MAX_DEPTH && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), depth + 1, found);
        }
    }
}

fn remove_tree(path: &Path, depth: u32) -> io::Result<()> {
    if depth < MAX_DEPTH {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                remove_tree(&entry.path(), depth + 1)?;
            }
        }
    }
    fs::remove_dir(path)
}

fn keyed(text: &str, wanted: &str) -> Option<u64> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.find(|(key, _)| *key == wanted).and_then(|(_, value)| value.trim().parse().ok())
}

/// What `resources` asks for, as cgroup files.
pub fn settings(resources: &Resources) -> Result<Vec<Setting>> {
    let Resources {
        cpu_shares,
        cpu_quota_micros,
        cpu_period_micros,
        memory_limit_bytes,
        memory_swap_limit_bytes,
        pids_limit,
        cpuset_cpus,
        cpuset_mems,
        unified,
    } = resources;
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String, optional| {
        settings.push(Setting { file: file.into(), value, optional });
    };
    if let Some(shares) = cpu_shares.filter(|shares| *shares > 0) {
        set("cpu.weight", cpu_weight(shares).to_string(), false);
    }
    if let Some(value) = cpu_max(*cpu_quota_micros, *cpu_period_micros) {
        set("cpu.max", value, false);
    }
    if let Some(limit) = memory_limit_bytes.filter(|limit| *limit != 0) {
        set("memory.max", limit_text(limit), false);
    }
    if let Some(swap) = memory_swap_limit_bytes.filter(|limit| *limit != 0) {
        set("memory.swap.max", swap_text(swap, memory_limit_bytes.unwrap_or(0))?, true);
    }
    if let Some(limit) = pids_limit.filter(|limit| *limit != 0) {
        set("pids.max", limit_text(limit), false);
    }
    for (file, value) in [("cpuset.cpus", cpuset_cpus), ("cpuset.mems", cpuset_mems)] {
        if !value.is_empty() {
            set(file, value.clone(), false);
        }
    }
    for (file, value) in unified {
        set(checked_name(file)?, value.clone(), false);
    }
    Ok(settings)
}

/// The limits of version 1 count memory and swap together, and CRI gives that sum.
fn swap_text(sum: i64, memory: i64) -> Result<String> {
    if sum < 0 {
        return Ok("max".into());
    }
    if memory > sum {
        return Err(Error::invalid(format!("the memory and swap limit {sum} is below the memory limit {memory}")));
    }
    Ok((sum - memory.max(0)).to_string())
}

fn limit_text(limit: i64) -> String {
    if limit < 0 { "max".into() } else { limit.to_string() }
}

/// Shares of cgroup v1 (2 to 262144) as weight of v2 (1 to 10000), linearly, as Kubernetes does it (KEP-2254).
fn cpu_weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

/// cpu.max: "quota period"; the kernel's default period is 100 ms.
fn cpu_max(quota: Option<i64>, period: Option<u64>) -> Option<String> {
    let period = period.filter(|period| *period > 0);
    let quota = quota.filter(|quota| *quota != 0);
    let period_text = || period.map(|period| format!(" {period}")).unwrap_or_default();
    match quota {
        None => period.map(|period| format!("max {period}")),
        Some(quota) if quota < 0 => Some(format!("max{}", period_text())),
        Some(quota) => Some(format!("{quota}{}", period_text())),
    }
}

/// A file name of a controller, such as "memory.oom.group"; none of the files that move processes or controllers.
fn checked_name(name: &str) -> Result<&str> {
    let controller = name.split('.').next().unwrap_or_default();
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    let known = ["cpu", "cpuset", "hugetlb", "io", "memory", "misc", "pids", "rdma"].contains(&controller);
    if plain && known && name.len() < 128 && name.contains('.') {
        return Ok(name);
    }
    Err(Error::invalid(format!("{name:?} is not the name of a cgroup v2 setting")))
}

#[cfg(test)]
impl Cgroup {
    /// A directory of files stands for the cgroup; nothing in it is reclaimed.
    pub(crate) fn of_files(files: &[(&str, &str)]) -> (tempfile::TempDir, Self) {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let cgroup = Self::open(directory.path().to_owned()).unwrap();
        (directory, cgroup)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(resources: &Resources) -> Vec<String> {
        settings(resources).unwrap().into_iter().map(|Setting { file, value, .. }| format!("{file}={value}")).collect()
    }

    #[test]
    fn absent_fields_set_nothing() {
        assert!(texts(&Resources::default()).is_empty());
        let zeros = Resources { cpu_shares: Some(0), memory_limit_bytes: Some(0), ..Resources::default() };
        assert!(texts(&zeros).is_empty());
    }

    #[test]
    fn fields_become_files() {
        let resources = Resources {
            cpu_shares: Some(1024),
            cpu_quota_micros: Some(50_000),
            cpu_period_micros: Some(100_000),
            memory_limit_bytes: Some(1 << 20),
            memory_swap_limit_bytes: Some(3 << 20),
            pids_limit: Some(-1),
            cpuset_cpus: "0-1".into(),
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        };
        let expected = [
            "cpu.weight=39",
            "cpu.max=50000 100000",
            "memory.max=1048576",
            "memory.swap.max=2097152",
            "pids.max=max",
            "cpuset.cpus=0-1",
            "memory.oom.group=1",
        ];
        assert_eq!(texts(&resources), expected);
    }

    #[test]
    fn cpu_limits_cover_every_combination() {
        assert_eq!(cpu_max(None, None), None);
        assert_eq!(cpu_max(Some(-1), None).as_deref(), Some("max"));
        assert_eq!(cpu_max(Some(-1), Some(5)).as_deref(), Some("max 5"));
        assert_eq!(cpu_max(Some(7), None).as_deref(), Some("7"));
        assert_eq!(cpu_max(None, Some(5)).as_deref(), Some("max 5"));
        assert_eq!((cpu_weight(1), cpu_weight(2), cpu_weight(262_144), cpu_weight(u64::MAX)), (1, 1, 10_000, 10_000));
    }

    #[test]
    fn names_that_are_no_setting_are_refused() {
        for bad in ["", "memory", "../memory.max", "memory./max", "cgroup.procs", "cgroup.kill", "x.y", "memory.max\n"]
        {
            let resources = Resources { unified: [(bad.to_owned(), "1".to_owned())].into(), ..Resources::default() };
            assert!(settings(&resources).unwrap_err().chain().contains(&format!("{bad:?}")));
        }
    }

    #[test]
    fn a_sum_of_memory_and_swap_below_the_memory_is_refused() {
        assert!(swap_text(1, 2).is_err());
        assert_eq!(swap_text(2, 2).unwrap(), "0");
        assert_eq!(swap_text(-1, 2).unwrap(), "max");
    }

    #[test]
    fn a_memory_limit_below_what_is_used_changes_nothing() {
        let (_directory, cgroup) = Cgroup::of_files(&[
            ("memory.current", "5000\n"),
            ("memory.max", "max"),
            ("cpu.weight", "100"),
            ("memory.reclaim", ""),
        ]);
        let update = |bytes, shares| {
            let resources =
                Resources { memory_limit_bytes: Some(bytes), cpu_shares: Some(shares), ..Resources::default() };
            cgroup.update(&settings(&resources).unwrap())
        };
        let error = update(4096, 1024).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(error.chain().contains("4096") && error.chain().contains("5000"), "{}", error.chain());
        assert_eq!(
            (cgroup.read("memory.max").unwrap(), cgroup.read("cpu.weight").unwrap()),
            ("max".into(), "100".into())
        );
        update(8192, 1024).unwrap();
        assert_eq!((cgroup.number("memory.max"), cgroup.number("cpu.weight")), (Some(8192), Some(39)));
        update(-1, 1024).unwrap();
        assert_eq!(cgroup.read("memory.max").unwrap(), "max");
    }

    #[test]
    fn settings_before_a_refused_one_get_their_old_values_back() {
        let (directory, cgroup) = Cgroup::of_files(&[("cpu.weight", "100\n"), ("memory.current", "0")]);
        fs::create_dir(directory.path().join("memory.max")).unwrap();
        let resources = Resources { cpu_shares: Some(1024), memory_limit_bytes: Some(1 << 20), ..Resources::default() };
        assert!(cgroup.update(&settings(&resources).unwrap()).is_err());
        assert_eq!(cgroup.read("cpu.weight").unwrap(), "100");
    }

    #[test]
    fn a_file_that_is_missing_is_named_unless_it_may_be() {
        let (directory, cgroup) = Cgroup::of_files(&[("memory.max", "max"), ("memory.current", "0")]);
        // A guest has no swap: its limit has no file, and nothing to limit.
        let swap =
            Resources { memory_limit_bytes: Some(4096), memory_swap_limit_bytes: Some(4096), ..Resources::default() };
        cgroup.apply(&settings(&swap).unwrap()).unwrap();
        assert!(!directory.path().join("memory.swap.max").exists());
        let unknown = Resources { unified: [("memory.no".to_owned(), "1".to_owned())].into(), ..Resources::default() };
        let error = cgroup.apply(&settings(&unknown).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.chain().contains("memory.no"), "{}", error.chain());
    }
}
