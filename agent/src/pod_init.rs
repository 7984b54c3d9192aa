//! The PID namespace that containers of the pod share: made when the first container asks for it, kept by a process 1 that
//! reaps.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::sync::Mutex;

use crate::agent::blocking;
use crate::cgroup::Cgroup;
use crate::error::{Context as _, Result};
use crate::launch;
use crate::layout::Layout;
use crate::reaper::Reaper;
use crate::stub::message::{Descriptor, Launch, Role};

/// Name of its cgroup beside those of the containers; no container id looks like it.
const CGROUP: &str = "pod-init";

/// Process 1 of the shared PID namespace, as far as it exists.
pub struct PodInit {
    reaper: Arc<Reaper>,
    layout: Layout,
    /// Held while it is started: those who need it have to wait for it, and nobody else takes this lock.
    pidfd: Mutex<Option<OwnedFd>>,
}

impl PodInit {
    /// None yet.
    pub fn new(reaper: Arc<Reaper>, layout: Layout) -> Self {
        Self { reaper, layout, pidfd: Mutex::new(None) }
    }

    /// Its pidfd; starts it if it does not run.
    pub async fn pidfd(&self) -> Result<OwnedFd> {
        let mut current = self.pidfd.lock().await;
        let running = match current.take() {
            Some(pidfd) if !has_ended(&pidfd) => pidfd,
            _ => {
                let (reaper, layout) = (Arc::clone(&self.reaper), self.layout.clone());
                blocking(move || start(&reaper, &layout)).await?
            }
        };
        let copy = running.try_clone().context(|| "duplicate a pidfd")?;
        *current = Some(running);
        Ok(copy)
    }
}

fn start(reaper: &Arc<Reaper>, layout: &Layout) -> Result<OwnedFd> {
    let path = layout.cgroup_parent().join(CGROUP);
    let cgroup = if path.exists() { Cgroup::open(path)? } else { Cgroup::create(layout.cgroup_parent(), CGROUP)? };
    let directory = cgroup.clone_directory()?;
    let mut launch = Launch {
        role: Role::PodInit as i32,
        new_pid_namespace: true,
        mount_point: layout.mount_point().to_string_lossy().into_owned(),
        ..Launch::default()
    };
    let mut prepared = launch::prepare(reaper, &mut launch, &[(Descriptor::Cgroup, &directory)])?;
    prepared.go()?;
    let ended = || crate::error::Error::precondition("the process 1 of the pod's PID namespace ended at once");
    prepared.watched.pidfd.take().ok_or_else(ended)
}

/// A pidfd becomes readable when its process ends.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut poll = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(0))
}
