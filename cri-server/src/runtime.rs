//! All sandboxes: their drivers and their names.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ObjectId;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::container::{SpecError, check_sandbox};
use crate::context::Context;
use crate::cri;
use crate::grpc::status::chain;
use crate::leftovers;
use crate::sandbox::command::{Command, Reply};
use crate::sandbox::driver::Driver;
use crate::sandbox::{SandboxError, SandboxKey, SandboxPhase, SandboxRecord, now};
use crate::store::Stored;

/// Commands that may wait for a driver.
const MAILBOX: usize = 64;

/// The names of the runtime's handlers: the default one, and the same by its name.
pub const HANDLERS: [&str; 2] = ["", "isopod"];

/// The sandboxes. Clones are the same ones.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    context: Arc<Context>,
    drivers: Mutex<HashMap<ObjectId, Mailbox>>,
    names: Mutex<HashMap<SandboxKey, Reservation>>,
    tasks: TaskTracker,
}

/// The way to a driver.
#[derive(Clone)]
struct Mailbox {
    commands: mpsc::Sender<Command>,
    stopping: CancellationToken,
}

/// Who has a sandbox's name. A client that gave up and asks again gets the sandbox that was finished in the meantime.
enum Reservation {
    /// It is being brought up; these wait for it.
    Pending(Vec<Reply<ObjectId>>),
    /// It is up, but whoever asked for it had gone.
    Undelivered(ObjectId),
    /// It belongs to a client.
    Delivered(ObjectId),
}

impl Runtime {
    /// The runtime with no sandbox yet.
    pub fn new(context: Arc<Context>) -> Self {
        let inner = Inner { context, drivers: Mutex::default(), names: Mutex::default(), tasks: TaskTracker::new() };
        Self { inner: Arc::new(inner) }
    }

    /// The daemon's parts.
    pub fn context(&self) -> &Context {
        &self.inner.context
    }

    /// Takes up what an earlier daemon left, and removes what belongs to nothing.
    pub async fn resume(&self, stored: Stored) {
        let context = &self.inner.context;
        let mut containers: HashMap<ObjectId, Vec<_>> = HashMap::new();
        for record in stored.containers {
            containers.entry(record.sandbox.clone()).or_default().push(record);
        }
        let mut kept = Vec::new();
        for record in stored.sandboxes {
            let (id, key) = (record.id.clone(), record.key());
            let span = tracing::info_span!("sandbox", id = id.short());
            let own = containers.remove(&id).unwrap_or_default();
            // Whether its creation was answered is not known, unless it was used: who asks again gets it.
            let used = !own.is_empty() || record.phase != SandboxPhase::Ready;
            let resumed = Driver::resume(Arc::clone(context), record, own).instrument(span.clone()).await;
            let Some(driver) = resumed else { continue };
            tracing::info!(sandbox = %id, "sandbox taken up");
            let reserve = if used { Reservation::Delivered } else { Reservation::Undelivered };
            self.inner.names.lock().insert(key, reserve(id.clone()));
            self.inner.launch(&id, driver, span);
            kept.push(id);
        }
        for orphan in containers.into_values().flatten() {
            if let Err(error) = context.store.remove_container(&orphan.id).await {
                tracing::error!(container = %orphan.id, error = chain(&error), "a container of no sandbox is kept");
            }
        }
        leftovers::remove(context, &kept).await;
    }

    /// RunPodSandbox.
    pub async fn run_sandbox(
        &self,
        config: cri::PodSandboxConfig,
        runtime_handler: String,
    ) -> Result<ObjectId, SandboxError> {
        check_sandbox(&config).map_err(SandboxError::Spec)?;
        if !HANDLERS.contains(&runtime_handler.as_str()) {
            let shown: String = runtime_handler.chars().take(80).collect();
            let problem = format!("no runtime for {shown:?} is configured");
            return Err(SandboxError::Spec(SpecError::Invalid { field: "runtime_handler", problem }));
        }
        let (reply, answer) = oneshot::channel();
        let key = SandboxKey::of(&config);
        {
            let mut names = self.inner.names.lock();
            match names.get_mut(&key) {
                Some(Reservation::Pending(replies)) => replies.push(reply),
                Some(Reservation::Undelivered(id)) => {
                    let id = id.clone();
                    names.insert(key, Reservation::Delivered(id.clone()));
                    return Ok(id);
                }
                Some(Reservation::Delivered(id)) => {
                    return Err(SandboxError::Reserved { what: "sandbox", name: key.to_string(), owner: id.clone() });
                }
                None => {
                    let id = crate::random_id().map_err(|_| SandboxError::Ended)?;
                    names.insert(key, Reservation::Pending(vec![reply]));
                    let record = SandboxRecord {
                        id,
                        config,
                        runtime_handler,
                        created_at: now(),
                        phase: SandboxPhase::Starting,
                        vm: None,
                        network: None,
                        cgroup: None,
                        file_server: None,
                        size: None,
                        uid: None,
                    };
                    self.inner.tasks.spawn(Arc::clone(&self.inner).bring_up(record));
                }
            }
        }
        answer.await.map_err(|_| SandboxError::Ended)?
    }

    /// Sends a command to a sandbox's driver and awaits its answer.
    pub async fn ask<T>(
        &self,
        sandbox: &ObjectId,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, SandboxError> {
        let driver = self.inner.drivers.lock().get(sandbox).cloned();
        let gone = || SandboxError::NotFound { what: "sandbox", id: sandbox.to_string() };
        let driver = driver.ok_or_else(gone)?;
        let (reply, answer) = oneshot::channel();
        let command = command(reply);
        let ends = command.ends_sandbox();
        driver.commands.send(command).await.map_err(|_| gone())?;
        if ends {
            driver.stopping.cancel();
        }
        answer.await.map_err(|_| SandboxError::Ended)?
    }

    /// Lets the drivers finish what they are at, at most `deadline`. Sandboxes live on.
    pub async fn drain(&self, deadline: Duration) {
        self.inner.drivers.lock().clear();
        self.inner.tasks.close();
        if tokio::time::timeout(deadline, self.inner.tasks.wait()).await.is_err() {
            tracing::warn!("not every sandbox's work has finished");
        }
    }
}

impl Inner {
    async fn bring_up(self: Arc<Self>, record: SandboxRecord) {
        let (id, key) = (record.id.clone(), record.key());
        let span = tracing::info_span!("sandbox", id = id.short());
        let started = Driver::start(Arc::clone(&self.context), record).instrument(span.clone()).await;
        match started {
            Ok(driver) => {
                self.launch(&id, driver, span);
                let mut names = self.names.lock();
                let replies = match names.insert(key.clone(), Reservation::Undelivered(id.clone())) {
                    Some(Reservation::Pending(replies)) => replies,
                    Some(Reservation::Undelivered(_) | Reservation::Delivered(_)) | None => Vec::new(),
                };
                let mut delivered = false;
                for reply in replies {
                    delivered |= reply.send(Ok(id.clone())).is_ok();
                }
                if delivered {
                    names.insert(key, Reservation::Delivered(id));
                }
            }
            Err(error) => {
                let reservation = self.names.lock().remove(&key);
                let Some(Reservation::Pending(replies)) = reservation else { return };
                span.in_scope(|| tracing::info!(error = chain(&error), "the sandbox did not start"));
                let error = Arc::new(error);
                for reply in replies {
                    let _ = reply.send(Err(SandboxError::Shared(Arc::clone(&error)))); // The client may have gone.
                }
            }
        }
    }

    /// Runs the driver in a task that ends with the sandbox, and frees its name then.
    fn launch(self: &Arc<Self>, id: &ObjectId, driver: Driver, span: tracing::Span) {
        let (sender, commands) = mpsc::channel(MAILBOX);
        self.drivers.lock().insert(id.clone(), Mailbox { commands: sender, stopping: driver.stopping() });
        let (inner, id) = (Arc::clone(self), id.clone());
        self.tasks.spawn(
            async move {
                driver.run(commands).await;
                inner.drivers.lock().remove(&id);
                inner.names.lock().retain(|_, reservation| match reservation {
                    Reservation::Delivered(owner) | Reservation::Undelivered(owner) => *owner != id,
                    Reservation::Pending(_) => true,
                });
            }
            .instrument(span),
        );
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use isopod_image_store::{ImageStore, StoreConfig};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;
    use tokio::time::timeout;

    use super::*;
    use crate::config::{Config, RawConfig};
    use crate::container::ContainerRecord;
    use crate::guest::GuestError;
    use crate::index::Index;
    use crate::network::Network;
    use crate::sandbox::resources;
    use crate::sandbox::users::Users;
    use crate::store::Store;
    use crate::vmm::{VSOCK_SOCKET, Vm};
    use crate::volume::mirror::watch::Watches;

    const SOON: Duration = Duration::from_secs(10);

    /// What a daemon has whose directories are below `directory`.
    pub(crate) fn context(directory: &Path) -> Context {
        let raw = RawConfig {
            root: Some(directory.join("root")),
            state: Some(directory.join("state")),
            ..RawConfig::default()
        };
        let config = Config::check(raw).expect("a good configuration");
        std::fs::create_dir(&config.root).expect("made");
        let store = Store::open(&config.root.join("state.redb")).expect("opened");
        let images = ImageStore::open(StoreConfig::new(config.root.join("images"))).expect("opened");
        let network = Network::new(&config, store.clone());
        let users = Users::new(config.vmm.users);
        Context { config, store, images, network, users, index: Index::default(), watches: Watches::start() }
    }

    fn created(sandbox: &ObjectId) -> ContainerRecord {
        ContainerRecord::for_tests(ObjectId::from_random([2; 32]), sandbox.clone())
    }

    #[tokio::test]
    async fn a_stop_does_not_wait_for_a_start_that_hangs_in_the_guest() {
        let directory = tempfile::tempdir().expect("a directory");
        let context = Arc::new(context(directory.path()));
        let mut record = SandboxRecord::for_tests(ObjectId::from_random([1; 32]));
        let (sandbox, state) = (record.id.clone(), resources::directory(&context, &record.id));
        std::fs::create_dir_all(&state).expect("made");
        let mut vmm = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        record.vm = Some(Vm::of_process(vmm.id() as i32, &state).identity());

        // A guest that takes every connection and says nothing.
        let listener = UnixListener::bind(state.join(VSOCK_SOCKET)).expect("bound");
        let (connected, connection) = oneshot::channel();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("the daemon");
            while stream.read_u8().await.expect("a line") != b'\n' {}
            stream.write_all(b"OK 1\n").await.expect("written");
            let _ = connected.send(()); // It is awaited.
            std::future::pending::<()>().await;
            drop(stream);
        });

        let runtime = Runtime::new(Arc::clone(&context));
        let container = created(&sandbox);
        let id = container.id.clone();
        let driver = Driver::resume(context, record, vec![container]).await.expect("it is ready");
        runtime.inner.launch(&sandbox, driver, tracing::Span::none());
        let (starting, name) = (runtime.clone(), sandbox.clone());
        let start = tokio::spawn(async move { starting.ask(&name, |reply| Command::Start(id, reply)).await });
        timeout(SOON, connection).await.expect("in time").expect("the start is under way");
        let (stopping, name) = (runtime.clone(), sandbox.clone());
        let stop = tokio::spawn(async move { stopping.ask(&name, Command::Stop).await });

        let error = timeout(SOON, start).await.expect("given up").expect("no panic").expect_err("not started");
        assert!(matches!(error, SandboxError::Guest { source: GuestError::GivenUp { .. }, .. }), "{error:?}");
        vmm.kill().expect("killed");
        vmm.wait().expect("reaped");
        timeout(SOON, stop).await.expect("in time").expect("no panic").expect("stopped");
        let shown = runtime.context().index.sandbox(sandbox.as_str()).expect("shown");
        assert_eq!(shown.phase, SandboxPhase::NotReady);
        assert!(!state.exists());
    }
}
