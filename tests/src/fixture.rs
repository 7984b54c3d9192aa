//! The end-to-end tests' handles on isopod: [`Cri`] (a client), [`Daemon`] (a daemon of a test's own), [`TestPod`] and
//! [`TestContainer`].
//!
//! They run in the test node. `tests/session` has started the registry and the daemon that all tests share, and set
//! ISOPOD_REPO, ISOPOD_SOCKET, ISOPOD_REGISTRY and ISOPOD_CONFIG.

mod client;
mod daemon;
mod kubelet;
mod pod;
mod systemd;

pub use client::Cri;
pub use daemon::{Build, Daemon, vmms_below};
pub use kubelet::Kubelet;
pub use pod::{LogLine, Output, TestContainer, TestPod, shell};
pub use systemd::Systemd;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// The image most tests use.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";

/// A variable of `tests/session`.
pub fn setting(name: &str) -> anyhow::Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set; run the tests with `make e2e`"))
}

/// The repository, with what was built in out/.
pub fn repository() -> anyhow::Result<PathBuf> {
    Ok(setting("ISOPOD_REPO")?.into())
}

/// A name that no other test of this run has.
pub fn unique(stem: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{stem}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Tries `probe` until it gives a value, for at most `limit`; `what` is for the message when it does not.
pub async fn eventually<T>(
    what: &str,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = probe().await {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("no {what} within {limit:?}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
