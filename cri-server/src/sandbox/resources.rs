//! What a sandbox holds on the host, and the one place where all of it is released.

use std::path::PathBuf;
use std::time::Duration;

use isopod_proto::ObjectId;
use tokio::time::timeout;

use super::{SandboxError, SandboxRecord, scratch};
use crate::cgroup;
use crate::context::Context;
use crate::grpc::status::chain;
use crate::vmm::Vm;

/// How long a killed VMM may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

/// The directory of a sandbox's sockets, exit record and log progress.
pub fn directory(context: &Context, id: &ObjectId) -> PathBuf {
    // Not the whole id: the names of sockets have to be short.
    context.config.state.join("sandboxes").join(id.short())
}

/// Kills the sandbox's file server if it still runs, and waits until it has ended.
pub async fn end_file_server(context: &Context, record: &SandboxRecord) {
    let directory = directory(context, &record.id);
    let Some(server) = &record.file_server else { return };
    if let Ok(process) = Vm::find(server.process, &directory) {
        process.kill();
        if timeout(KILL_DEADLINE, process.ended()).await.is_err() {
            // Its cgroup cannot be removed then, which is reported.
            tracing::warn!(pid = server.process.pid, "a file server does not end");
        }
    }
}

/// Kills the sandbox's VMM if it still runs, and gives back tap, address, scratch disk, directory and cgroup. All is tried
/// even if some of it fails. What is not there any more is a success, so this may be repeated.
pub async fn release(context: &Context, record: &SandboxRecord) -> Result<(), SandboxError> {
    let mut problems = Vec::new();
    let directory = directory(context, &record.id);
    if let Some(identity) = record.vm
        && let Ok(vm) = Vm::find(identity, &directory)
    {
        vm.kill();
        if timeout(KILL_DEADLINE, vm.ended()).await.is_err() {
            problems.push(format!("VMM process {} does not end", identity.pid));
        }
    }
    end_file_server(context, record).await;
    if let Err(error) = context.network.detach(&record.id).await {
        problems.push(chain(&error));
    }
    if let Some(path) = &record.cgroup
        && let Err(error) = cgroup::remove(path).await
    {
        problems.push(chain(&error));
    }
    let scratch = scratch::path(&context.config.root, &record.id);
    let removed = std::fs::remove_file(&scratch).map_err(|error| (scratch, error));
    let emptied = std::fs::remove_dir_all(&directory).map_err(|error| (directory, error));
    for (path, error) in [removed, emptied].into_iter().filter_map(Result::err) {
        if error.kind() != std::io::ErrorKind::NotFound {
            problems.push(format!("cannot remove {}: {error}", path.display()));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(SandboxError::Release { problems: problems.join("; ") }) }
}
