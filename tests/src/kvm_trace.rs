//! Counts VM exits with KVM's tracepoints. The counts are of the whole node: nothing else may run VMs meanwhile.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// VM exits since [`ExitCounter::start`].
#[derive(Clone, Copy, Debug)]
pub struct Exits {
    /// All exits from guest mode.
    pub total: u64,
    /// Those that returned to the VMM process.
    pub userspace: u64,
}

/// Counting histograms on `kvm_exit` and `kvm_userspace_exit`; removed on drop.
pub struct ExitCounter {
    histograms: [(PathBuf, &'static str); 2],
}

impl ExitCounter {
    /// Starts counting from zero.
    pub fn start() -> Result<Self> {
        let events = Path::new("/sys/kernel/tracing/events/kvm");
        let histograms = [
            (events.join("kvm_exit"), "hist:keys=exit_reason"),
            (events.join("kvm_userspace_exit"), "hist:keys=reason"),
        ];
        for (event, trigger) in &histograms {
            fs::write(event.join("trigger"), trigger)
                .with_context(|| format!("cannot set the trigger {trigger} of {}", event.display()))?;
        }
        Ok(Self { histograms })
    }

    /// The counts so far.
    pub fn read(&self) -> Result<Exits> {
        let [total, userspace] = &self.histograms;
        Ok(Exits { total: hits(&total.0)?, userspace: hits(&userspace.0)? })
    }
}

impl Drop for ExitCounter {
    fn drop(&mut self) {
        for (event, trigger) in &self.histograms {
            // The next run sets it anew; there is nobody to tell here.
            let _ = fs::write(event.join("trigger"), format!("!{trigger}"));
        }
    }
}

/// The "Hits: N" of a histogram's totals.
fn hits(event: &Path) -> Result<u64> {
    let path = event.join("hist");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Hits: "))
        .next_back()
        .and_then(|count| count.trim().parse().ok())
        .with_context(|| format!("{} has no total", path.display()))
}
