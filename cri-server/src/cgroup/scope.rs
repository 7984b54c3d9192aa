//! Cgroups that systemd makes: a transient scope a sandbox, as `systemd-run --scope` makes one (org.freedesktop.systemd1(5)).

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use zbus::{Connection, DynamicType, Variant};

use super::{CgroupError, CpuSets};
use crate::cpu_set::CpuSet;

const SERVICE: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";
/// How long systemd may take for one request.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at whether a process is in its scope.
const INTERVAL: Duration = Duration::from_millis(2);

type Properties<'v> = Vec<(&'static str, Variant<'v>)>;
type Failure = Box<dyn Error + Send + Sync>;

/// The name of the scope whose cgroup is at `path`, if it is one.
pub(super) fn unit(path: &Path) -> Option<&str> {
    path.file_name()?.to_str().filter(|name| name.ends_with(".scope"))
}

/// The path below the hierarchy's root of the slice `given`, which is its name or that path (systemd.slice(5)): a part of the name
/// a level.
pub(super) fn slice(given: &str) -> Option<PathBuf> {
    let name = given.rsplit('/').next()?;
    let stem = name.strip_suffix(".slice")?;
    let path = if stem == "-" { PathBuf::new() } else { levels(stem)? };
    (given == name || Path::new("/").join(&path) == Path::new(given)).then_some(path)
}

fn levels(stem: &str) -> Option<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    if !stem.bytes().all(plain) || stem.split('-').any(str::is_empty) {
        return None;
    }
    let ends = stem.match_indices('-').map(|(end, _)| end).chain([stem.len()]);
    Some(ends.map(|end| format!("{}.slice", &stem[..end])).collect())
}

/// Makes the scope `unit`, whose cgroup is to be at `path`, with the process `pid` in it. It goes with its last process.
pub(super) async fn start(unit: &str, path: &Path, pid: i32) -> Result<(), CgroupError> {
    let slice = path.parent().and_then(Path::file_name).and_then(|slice| slice.to_str());
    // Directly in the hierarchy's root: the root slice.
    let slice = slice.filter(|slice| slice.ends_with(".slice")).unwrap_or("-.slice");
    let properties: Properties<'_> = vec![
        ("Description", "pod of isopod".into()),
        ("Slice", slice.into()),
        ("PIDs", vec![pid.cast_unsigned()].into()),
        // What is in it is isopod's: systemd neither moves it nor takes controllers away.
        ("Delegate", true.into()),
        // A shutdown ends it last, when what stops pods in order (isopod stop-all) has had its time.
        ("DefaultDependencies", false.into()),
        ("CollectMode", "inactive-or-failed".into()),
    ];
    let auxiliary: Vec<(&str, Properties<'_>)> = vec![];
    let started = async {
        call("StartTransientUnit", &(unit, "fail", properties, auxiliary)).await?;
        until_in(pid, path).await
    };
    within("start", unit, started).await
}

/// Restricts the scope, whose cgroup is at `path`, to `sets`: by systemd, which would undo what it does not know of.
pub(super) async fn restrict(unit: &str, path: &Path, sets: &CpuSets) -> Result<(), CgroupError> {
    let properties: Properties<'_> = [("AllowedCPUs", &sets.cpus), ("AllowedMemoryNodes", &sets.mems)]
        .into_iter()
        .filter_map(|(name, set)| Some((name, Variant::from(set.as_ref()?.mask()))))
        .collect();
    if properties.is_empty() {
        return Ok(());
    }
    let restricted = async {
        call("SetUnitProperties", &(unit, true, properties)).await?;
        until_set(&path.join("cpuset.cpus"), &sets.cpus).await?;
        until_set(&path.join("cpuset.mems"), &sets.mems).await
    };
    within("restrict", unit, restricted).await
}

async fn within(
    doing: &'static str,
    unit: &str,
    done: impl Future<Output = Result<(), Failure>>,
) -> Result<(), CgroupError> {
    let done = timeout(DEADLINE, done).await;
    let done = done.unwrap_or_else(|_| Err(format!("it took longer than {} s", DEADLINE.as_secs()).into()));
    done.map_err(|source| CgroupError::Systemd { doing, unit: unit.to_owned(), source })
}

/// Calls a method of systemd's manager.
async fn call(method: &'static str, body: &(impl serde::Serialize + DynamicType)) -> Result<(), Failure> {
    let bus = Connection::system().await.map_err(|error| format!("cannot connect to the system bus: {error}"))?;
    bus.call_method(Some(SERVICE), PATH, Some(INTERFACE), method, body).await?;
    Ok(())
}

/// Waits until `pid` is in the cgroup at `path`: systemd answers before it has moved it.
async fn until_in(pid: i32, path: &Path) -> Result<(), Failure> {
    let root = super::root().ok_or("no cgroup v2 hierarchy is mounted")?;
    let wanted = format!("0::/{}", path.strip_prefix(root)?.display());
    until(Path::new(&format!("/proc/{pid}/cgroup")), |cgroups| cgroups.lines().any(|line| line == wanted)).await
}

/// Waits until `file` has `set`, if there is one: systemd answers before it has written it.
async fn until_set(file: &Path, set: &Option<CpuSet>) -> Result<(), Failure> {
    let Some(wanted) = set.as_ref().map(CpuSet::to_string) else { return Ok(()) };
    until(file, |list| list.trim() == wanted).await
}

/// Reads `file` until it is as it is `wanted`.
async fn until(file: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Failure> {
    let since = Instant::now();
    loop {
        let read = tokio::fs::read_to_string(file).await;
        if read.as_deref().is_ok_and(&wanted) {
            return Ok(());
        }
        if since.elapsed() > DEADLINE / 2 {
            return Err(format!("{} has {read:?} still", file.display()).into());
        }
        sleep(INTERVAL).await;
    }
}
