//! What an earlier daemon left on the host and no sandbox has: found by its name, and removed when the daemon starts.
//!
//! There should be little of it, as a sandbox's record is durable before anything is made for it. It is what is left after a
//! lost or unreadable state database, or after a failed release.

use std::path::{Path, PathBuf};
use std::time::Duration;

use isopod_proto::ObjectId;
use tokio::time::timeout;

use crate::cgroup;
use crate::context::Context;
use crate::grpc::status::chain;
use crate::sandbox::{resources, scratch};
use crate::vmm::Vm;

/// How long a killed VMM may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

/// Removes VMM processes, taps, addresses, cgroups, directories and scratch disks that none of the sandboxes `kept` has.
pub async fn remove(context: &Context, kept: &[ObjectId]) {
    let sandboxes = context.config.state.join("sandboxes");
    let directories: Vec<_> = kept.iter().map(|id| resources::directory(context, id)).collect();
    // First, as a VMM holds the rest.
    kill_vmms(&sandboxes, &directories).await;
    let known: Vec<_> = context.index.sandboxes().iter().map(|record| record.known_pod()).collect();
    if let Err(error) = context.network.restore(&known).await {
        tracing::warn!(error = chain(&error), "the network is not as the sandboxes need it");
    }
    if let Err(error) = cgroup::remove_orphans(kept).await {
        tracing::warn!(error = chain(&error), "left-over cgroups are not removed");
    }
    remove_paths(&sandboxes, &directories);
    let scratches: Vec<_> = kept.iter().map(|id| scratch::path(&context.config.root, id)).collect();
    remove_paths(&scratch::directory(&context.config.root), &scratches);
}

/// Kills the VMMs whose directories are below `parent` and not among `known`.
async fn kill_vmms(parent: &Path, known: &[PathBuf]) {
    for vm in Vm::find_all(parent) {
        let name = vm.directory().file_name();
        if known.iter().any(|directory| directory.file_name() == name) {
            continue;
        }
        let pid = vm.identity().pid;
        tracing::warn!(pid, directory = %vm.directory().display(), "killing a VMM that no sandbox has");
        vm.kill();
        if timeout(KILL_DEADLINE, vm.ended()).await.is_err() {
            tracing::warn!(pid, "it does not end");
        }
    }
}

/// Removes what is in `parent` but for `known` and the templates of file systems.
fn remove_paths(parent: &Path, known: &[PathBuf]) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        if known.contains(&path) || entry.file_name().to_string_lossy().starts_with(crate::ext4::TEMPLATE) {
            continue;
        }
        tracing::info!(path = %path.display(), "removing what no sandbox has");
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "it cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::{Child, Command};

    use super::*;

    fn vmm(directory: &Path) -> Child {
        std::fs::create_dir_all(directory).expect("made");
        let log = File::create(directory.join("vmm.log")).expect("made");
        Command::new("sleep").arg("60").stdout(log).spawn().expect("started")
    }

    #[tokio::test]
    async fn a_vmm_of_no_sandbox_is_killed_and_the_others_are_not() {
        let state = tempfile::tempdir().expect("a directory");
        let (ours, lost) = (state.path().join("0123"), state.path().join("4567"));
        let (mut kept, mut killed, mut deleted) = (vmm(&ours), vmm(&lost), vmm(&state.path().join("89ab")));
        // It is found even if its directory is gone.
        std::fs::remove_dir_all(state.path().join("89ab")).expect("removed");
        // A killed child ends, as the daemon sees it, though it is not reaped.
        kill_vmms(state.path(), std::slice::from_ref(&ours)).await;
        assert!(!killed.wait().expect("ended").success());
        assert!(!deleted.wait().expect("ended").success());
        assert!(kept.try_wait().expect("asked").is_none());
        kept.kill().expect("killed");
        kept.wait().expect("reaped");
    }

    #[test]
    fn what_no_sandbox_has_is_removed_but_not_the_templates() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(path("lost/inside")).expect("made");
        for file in ["kept.ext4", "lost.ext4", "template-1.ext4"] {
            File::create(path(file)).expect("made");
        }
        remove_paths(directory.path(), &[path("kept.ext4")]);
        let there: Vec<_> =
            ["kept.ext4", "template-1.ext4", "lost.ext4", "lost"].map(|name| path(name).exists()).into();
        assert_eq!(there, [true, true, false, false]);
    }
}
