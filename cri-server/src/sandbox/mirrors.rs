//! The volumes that a pod has in guest memory ([`crate::volume::mirror`]): one mirror for each host path that its containers
//! mount, and one task that keeps it up to date, until the last of these containers is removed or the VM ends.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ErrorKind;
use isopod_proto::agent::{MirrorPart, RemoveMirrorRequest, SetMirrorResponse};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tonic::{Response, Status};

use super::SandboxError;
use super::bring_up::Up;
use super::driver::Driver;
use super::volumes::blocking;
use crate::grpc::status::chain;
use crate::guest::{Guest, LONG, SHORT};
use crate::volume::kubelet;
use crate::volume::mirror;
use crate::volume::mirror::read::{self, ReadError, Snapshot};
use crate::volume::mirror::watch::Subscription;
use crate::volume::plan::HostSource;

/// Bytes of a mirror in one message.
const PART: usize = 1 << 20;
/// How long a change may go on before it is looked at: the kubelet makes several steps of it.
const SETTLE: Duration = Duration::from_millis(100);
/// How often a volume is looked at that cannot be watched.
const LOOK: Duration = Duration::from_secs(30);
/// Pauses between attempts to send an update.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A mirror's task, which ends with this.
pub(super) struct Mirror(JoinHandle<()>);

impl Drop for Mirror {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Mirror {
    /// Ends the task. Nothing is on its way to the guest then.
    async fn end(mut self) {
        self.0.abort();
        // It was told to end, so that this is no news.
        let _ = (&mut self.0).await;
    }
}

/// What keeps one mirror up to date.
struct Keeper {
    up: Up,
    path: PathBuf,
    name: String,
    watch: Arc<Subscription>,
    /// Of what the guest has, if that is known.
    digest: Option<[u8; 32]>,
}

impl Driver {
    /// Makes the mirror of a volume if it is one of those that are mirrored, or brings it up to date. False: it is to be shared.
    pub(super) async fn mirror(&mut self, source: &HostSource) -> Result<bool, SandboxError> {
        if !mirror::is_mirrored(source) {
            return Ok(false);
        }
        let path = &source.path;
        // What it has taken may be older than what is taken now.
        let before = match self.mirrors.remove(path) {
            Some(mirror) => {
                mirror.end().await;
                true
            }
            None => false,
        };
        let watch = Arc::new(self.context.watches.subscribe());
        let result = self.make_mirror(path, &watch).await;
        let digest = match &result {
            Ok(digest) => *digest,
            Err(_) => None,
        };
        // Other containers may have it, whatever has become of this attempt.
        if before || digest.is_some() {
            self.keep_mirror(path, watch, digest)?;
        }
        result.map(|digest| digest.is_some())
    }

    /// The digest of what has been sent; none: it cannot be mirrored.
    async fn make_mirror(&self, path: &Path, watch: &Arc<Subscription>) -> Result<Option<[u8; 32]>, SandboxError> {
        let snapshot = match take(path, watch).await? {
            Ok(snapshot) => snapshot,
            // The share makes it, or says what is wrong with it.
            Err(ReadError::Gone(_)) => return Ok(None),
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(path = %path.display(), error, "inotify will not tell of changes of a volume");
                return Ok(None);
            }
        };
        let digest = snapshot.digest;
        let sent = self.call("SetMirror", LONG, send(self.up()?, kubelet::guest_name(path), true, snapshot)).await;
        sent.map_err(|source| SandboxError::Guest { doing: "cannot give a volume to the guest", source })?;
        Ok(Some(digest))
    }

    fn keep_mirror(
        &mut self,
        path: &Path,
        watch: Arc<Subscription>,
        digest: Option<[u8; 32]>,
    ) -> Result<(), SandboxError> {
        let keeper =
            Keeper { up: self.up()?.clone(), path: path.into(), name: kubelet::guest_name(path), watch, digest };
        self.mirrors.insert(path.into(), Mirror(tokio::spawn(keeper.keep())));
        Ok(())
    }

    /// Takes up the mirrors of an earlier daemon: what has changed meanwhile is sent.
    pub(super) fn resume_mirrors(&mut self) {
        for path in self.mirrors_in_use() {
            let watch = Arc::new(self.context.watches.subscribe());
            if let Err(error) = self.keep_mirror(&path, watch, None) {
                tracing::warn!(path = %path.display(), error = chain(&error), "a volume is not kept up to date");
            }
        }
    }

    fn mirrors_in_use(&self) -> BTreeSet<PathBuf> {
        self.containers.values().flat_map(|container| container.record.mirrors.iter().cloned()).collect()
    }

    /// Removes the mirrors that no container has any more.
    pub(super) async fn release_mirrors(&mut self) {
        let used = self.mirrors_in_use();
        let unused: Vec<_> = self.mirrors.keys().filter(|path| !used.contains(*path)).cloned().collect();
        for path in unused {
            let Some(mirror) = self.mirrors.remove(&path) else { continue };
            mirror.end().await;
            let Ok(up) = self.up() else { continue };
            let mut client = up.guest.client();
            let answer = client.remove_mirror(RemoveMirrorRequest { name: kubelet::guest_name(&path) });
            if let Err(error) = self.call("RemoveMirror", SHORT, answer).await {
                // It goes with the guest, or is brought up to date for the next container that mounts it.
                tracing::warn!(path = %path.display(), error = chain(&error), "the guest keeps a volume that is not used");
            }
        }
    }
}

/// Reads the volume, and watches it from before that on.
async fn take(path: &Path, watch: &Arc<Subscription>) -> Result<Result<Snapshot, ReadError>, SandboxError> {
    let (path, watch) = (path.to_owned(), Arc::clone(watch));
    blocking(move || read::read(&path, &|directory| watch.watch(directory))).await
}

async fn send(up: &Up, name: String, create: bool, snapshot: Snapshot) -> Result<Response<SetMirrorResponse>, Status> {
    let mut client = up.guest.client();
    let mut parts: Vec<_> = snapshot
        .content
        .chunks(PART)
        .map(|content| MirrorPart { content: content.to_vec(), ..MirrorPart::default() })
        .collect();
    if let Some(first) = parts.first_mut() {
        (first.name, first.create, first.read_at_nanos) = (name, create, snapshot.read_at);
    }
    client.set_mirror(tokio_stream::iter(parts)).await
}

impl Keeper {
    /// Sends each change, until the volume is gone or nobody can use it any more.
    async fn keep(mut self) {
        let vm = Arc::clone(&self.up.vm);
        tokio::select! {
            () = self.follow() => {}
            _ = vm.ended() => {}
        }
    }

    async fn follow(&mut self) {
        // What an earlier daemon has sent may be old.
        let mut current = self.digest.is_some();
        let mut pause = FIRST_PAUSE;
        loop {
            if std::mem::replace(&mut current, true) {
                self.change().await;
            }
            let snapshot = match take(&self.path, &self.watch).await {
                Ok(Ok(snapshot)) if self.digest == Some(snapshot.digest) => continue,
                Ok(Ok(snapshot)) => snapshot,
                Ok(Err(ReadError::Gone(_))) => return,
                // What is wrong is looked at again after the next change; a volume that does not hold still has one to come.
                Ok(Err(error)) => {
                    let error = chain(&error);
                    tracing::warn!(path = %self.path.display(), error, "a volume's change is not shown to its containers");
                    continue;
                }
                Err(_) => return, // The daemon ends.
            };
            let digest = snapshot.digest;
            let sending = send(&self.up, self.name.clone(), false, snapshot);
            match Guest::call("SetMirror", LONG, sending).await {
                Ok(_) => {
                    tracing::info!(path = %self.path.display(), "a volume's change is in the guest");
                    (self.digest, pause) = (Some(digest), FIRST_PAUSE);
                }
                Err(error) if is_final(error.kind()) => {
                    tracing::warn!(path = %self.path.display(), error = chain(&error), "a volume stays as it was");
                    return;
                }
                Err(error) => {
                    tracing::info!(path = %self.path.display(), error = chain(&error), "a volume's change is sent again");
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    // Nobody knows how far it came.
                    (self.digest, current) = (None, false);
                }
            }
        }
    }

    /// Waits for a change, and until most of it is over.
    async fn change(&self) {
        tokio::select! {
            () = self.watch.changed() => {}
            () = sleep(LOOK), if self.watch.is_blind() => {}
        }
        sleep(SETTLE).await;
    }
}

/// Whether another attempt would fail alike.
fn is_final(kind: ErrorKind) -> bool {
    match kind {
        ErrorKind::Unavailable | ErrorKind::DeadlineExceeded | ErrorKind::ResourceExhausted | ErrorKind::Internal => {
            false
        }
        ErrorKind::InvalidArgument
        | ErrorKind::NotFound
        | ErrorKind::AlreadyExists
        | ErrorKind::FailedPrecondition
        | ErrorKind::Unimplemented
        | ErrorKind::Corrupt => true,
    }
}
