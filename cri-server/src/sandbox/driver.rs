//! The task that owns a sandbox.
//!
//! It takes commands from RPC handlers and events from its own tasks, one after the other. A handler that goes away changes
//! nothing: the work is done here. What takes its time (a command in a container, the grace of a stop) runs in a task of
//! the driver's and comes back as an event. A call of the guest that hangs is given up when the sandbox is to be stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::agent::{StatsRequest, StatsResponse};
use isopod_proto::{DiskId, ObjectId};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};

use super::admission::{self, Admission, Request};
use super::attach::SharedInput;
use super::bring_up::Up;
use super::command::{Command, Event, Reply};
use super::mirrors::Mirror;
use super::monitor::{self, End};
use super::{SandboxError, SandboxRecord, resources};
use crate::cgroup::CpuSets;
use crate::container::log::ContainerLog;
use crate::container::{ContainerRecord, ContainerState};
use crate::context::Context;
use crate::grpc::status::chain;
use crate::guest::{Guest, GuestError, LONG, SHORT};

/// A container as its driver has it.
pub(super) struct Container {
    pub record: ContainerRecord,
    pub log: Option<Arc<ContainerLog>>,
    pub follower: Option<JoinHandle<()>>,
    /// The stop signal has been sent; it is sent once only.
    pub stop_sent: bool,
    pub stop_replies: Vec<Reply<()>>,
    /// The client that created it got its id; otherwise the next one that asks for the same gets it.
    pub delivered: bool,
    /// Its standard input, for those who attach.
    pub input: Arc<SharedInput>,
}

impl Container {
    pub fn new(record: ContainerRecord) -> Self {
        let (log, follower, stop_replies) = (None, None, Vec::new());
        Self { record, log, follower, stop_sent: false, stop_replies, delivered: true, input: Arc::default() }
    }

    pub fn is_running(&self) -> bool {
        matches!(self.record.state, ContainerState::Running { .. })
    }

    /// Its end is recorded and shown: whoever waits for it is told.
    pub fn over(&mut self) {
        self.log = None;
        for reply in self.stop_replies.drain(..) {
            let _ = reply.send(Ok(())); // The client may have gone.
        }
    }
}

/// What a call of the guest has at least, when those before it have taken all the time there was.
const LAST_CHANCE: Duration = Duration::from_secs(2);

/// See the module's documentation.
pub struct Driver {
    pub(super) context: Arc<Context>,
    pub(super) record: SandboxRecord,
    pub(super) up: Option<Up>,
    pub(super) containers: BTreeMap<ObjectId, Container>,
    /// Image disks that are in the VM and mounted in the guest.
    pub(super) disks: BTreeSet<DiskId>,
    /// Volumes that are in guest memory, by their host paths, and the tasks that keep them up to date.
    pub(super) mirrors: BTreeMap<PathBuf, Mirror>,
    /// What the VM is restricted to, if that is known.
    pub(super) cpu_sets: Option<CpuSets>,
    /// Names of the emptyDir volumes that are known to be in the guest.
    pub(super) empty_dirs: BTreeSet<String>,
    /// Tasks that are not a container's follower: commands, timers, the watch on the VM.
    pub(super) tasks: JoinSet<()>,
    pub(super) events: mpsc::UnboundedReceiver<Event>,
    pub(super) sender: mpsc::UnboundedSender<Event>,
    /// It is taken over from an earlier daemon: what that one left in the guest is not known yet.
    pub(super) taken_over: bool,
    /// Until when the guest may take its time with what the driver is at: all calls of one command together have one deadline.
    pub(super) patience: Instant,
    /// Set when a stop waits for what the driver is at. It stays set, as a sandbox that is stopped never runs again.
    pub(super) stopping: CancellationToken,
}

impl Drop for Driver {
    fn drop(&mut self) {
        for container in self.containers.values() {
            if let Some(follower) = &container.follower {
                follower.abort();
            }
        }
    }
}

impl Driver {
    pub(super) fn new(context: Arc<Context>, record: SandboxRecord) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        Self {
            context,
            record,
            up: None,
            containers: BTreeMap::new(),
            disks: BTreeSet::new(),
            mirrors: BTreeMap::new(),
            cpu_sets: None,
            empty_dirs: BTreeSet::new(),
            tasks: JoinSet::new(),
            events,
            sender,
            taken_over: false,
            patience: Instant::now() + LONG,
            stopping: CancellationToken::new(),
        }
    }

    /// To be cancelled when a command that ends the sandbox is on its way.
    pub fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }

    /// [`Guest::call`], given up when the sandbox is to be stopped. `deadline` is less where earlier calls of the same command
    /// have taken too long: what is undone after a call that was not answered is not waited for as long again.
    pub(super) async fn call<T>(
        &self,
        call: &'static str,
        deadline: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, GuestError> {
        let left = self.patience.saturating_duration_since(Instant::now()).max(LAST_CHANCE);
        let deadline = deadline.min(left);
        let answer = tokio::select! {
            answer = Guest::call(call, deadline, answer) => answer,
            () = self.stopping.cancelled() => return Err(GuestError::GivenUp { call }),
        };
        match (answer, &self.up) {
            (Err(error), Some(up)) => Err(error.or_end_of(&up.vm, call).await),
            (answer, _) => answer,
        }
    }

    /// Works until the sandbox is removed, or nobody can send commands any more.
    pub async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        if self.taken_over {
            self.adopt().await;
        }
        loop {
            tokio::select! {
                biased;
                Some(event) = self.events.recv() => {
                    self.patience = Instant::now() + LONG;
                    self.handle(event).await;
                }
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {}
                command = commands.recv() => match command {
                    Some(command) => {
                        if self.execute(command).await {
                            return;
                        }
                    }
                    None => return,
                },
            }
        }
    }

    /// Carries a command out. True: the sandbox is removed.
    async fn execute(&mut self, command: Command) -> bool {
        self.patience = Instant::now() + LONG;
        // A reply fails if its client has gone, which is no concern of the sandbox.
        match command {
            Command::Stop(reply) => {
                let result = self.stop().await;
                let _ = reply.send(result);
            }
            Command::Remove(reply) => {
                let result = self.remove().await;
                let removed = result.is_ok();
                let _ = reply.send(result);
                return removed;
            }
            Command::Create(config, reply) => {
                let result = self.create(*config).await;
                let created = result.as_ref().ok().cloned();
                if reply.send(result).is_err()
                    && let Some(container) = created.and_then(|id| self.containers.get_mut(&id))
                {
                    container.delivered = false;
                }
            }
            Command::Start(id, reply) => {
                let result = self.start_container(&id).await;
                let _ = reply.send(result);
            }
            Command::StopContainer(id, grace, reply) => self.stop_container(&id, grace, reply).await,
            Command::RemoveContainer(id, reply) => {
                let result = self.remove_container(&id).await;
                let _ = reply.send(result);
            }
            Command::ReopenLog(id, reply) => {
                let _ = reply.send(self.reopen_log(&id));
            }
            Command::Exec(id, command, limit, reply) => self.exec(&id, command, limit, reply),
            Command::UpdateContainer(id, update, reply) => {
                let result = self.update_container(&id, &update).await;
                let _ = reply.send(result);
            }
            Command::UpdatePod(update, reply) => {
                let result = self.update_pod(&update).await;
                let _ = reply.send(result);
            }
            Command::Stats { descriptors, reply } => self.stats(descriptors, reply),
            // A failed reply: the client has gone.
            Command::OpenExec(id, words, wanted, reply) => drop(reply.send(self.open_exec(&id, words, wanted))),
            Command::OpenAttach(id, wanted, reply) => drop(reply.send(self.open_attach(&id, wanted))),
            Command::OpenPorts(reply) => drop(reply.send(self.up().cloned())),
        }
        false
    }

    pub(super) async fn handle(&mut self, event: Event) {
        match event {
            Event::Exited(id, end) => self.container_ended(&id, &end).await,
            Event::Lost(id, message) => self.container_lost(&id, message).await,
            Event::GraceOver(id) => self.kill_container(&id).await,
            Event::KillOverdue(id) => {
                if let Some(container) = self.containers.get_mut(&id).filter(|container| container.is_running()) {
                    for reply in container.stop_replies.drain(..) {
                        let late = SandboxError::Late { what: "the end of a killed container", seconds: 60 };
                        let _ = reply.send(Err(late)); // The client may have gone.
                    }
                }
            }
            Event::VmEnded(end) => self.vm_ended(&end).await,
        }
    }

    /// Decides whether `request` may be carried out.
    pub(super) fn admit(&self, subject: &ObjectId, request: Request) -> Result<bool, SandboxError> {
        match admission::admit(self.record.phase, request) {
            Admission::Proceed => Ok(true),
            Admission::Ignore => Ok(false),
            Admission::Deny(denial) => Err(SandboxError::Denied { subject: subject.short().to_owned(), denial }),
        }
    }

    /// The running guest, for what was admitted because it runs.
    pub(super) fn up(&self) -> Result<&Up, SandboxError> {
        self.up.as_ref().ok_or(SandboxError::Denied {
            subject: self.record.id.short().to_owned(),
            denial: admission::Denial::SandboxNotReady,
        })
    }

    /// The containers that run.
    pub(super) fn running(&self) -> Vec<ObjectId> {
        self.containers.values().filter(|container| container.is_running()).map(|c| c.record.id.clone()).collect()
    }

    /// Makes the sandbox's record durable, then shows it.
    pub(super) async fn save(&self) -> Result<(), SandboxError> {
        self.context.store.put_sandbox(&self.record).await?;
        self.context.index.publish_sandbox(&self.record);
        Ok(())
    }

    /// Makes a container's record durable, then shows it.
    pub(super) async fn save_container(&self, record: &ContainerRecord) -> Result<(), SandboxError> {
        self.context.store.put_container(record).await?;
        self.context.index.publish_container(record);
        Ok(())
    }

    pub(super) fn watch_vm(&mut self) {
        let Some(up) = &self.up else { return };
        let (vm, sender) = (Arc::clone(&up.vm), self.sender.clone());
        self.tasks.spawn(async move {
            let end = vm.ended().await;
            let _ = sender.send(Event::VmEnded(end)); // The driver ends only with the sandbox or the daemon.
        });
    }

    /// Opens the container's log and follows its process.
    pub(super) fn follow(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        let up = self.up()?.clone();
        let log = self.open_log(id)?;
        let sender = self.sender.clone();
        let Some(container) = self.containers.get_mut(id) else { return Ok(()) };
        let (terminal, id) = (container.record.config.tty, id.clone());
        container.follower = Some(tokio::spawn(async move {
            let event = match monitor::follow(up, id.to_string(), terminal, log).await {
                End::Exited(end) => Event::Exited(id, end),
                End::Lost(error) => Event::Lost(id, chain(&error)),
                End::VmEnded => return, // Somebody else tells.
            };
            let _ = sender.send(event); // As above.
        }));
        Ok(())
    }

    /// The container's log, made if it is not there.
    pub(super) fn open_log(&mut self, id: &ObjectId) -> Result<Arc<ContainerLog>, SandboxError> {
        let progress = resources::directory(&self.context, &self.record.id).join(format!("{}.progress", id.short()));
        let container = self.containers.get_mut(id).ok_or(SandboxError::Ended)?;
        if let Some(log) = &container.log {
            return Ok(Arc::clone(log));
        }
        let log = Arc::new(ContainerLog::open(container.record.log_path.clone(), &progress)?);
        container.log = Some(Arc::clone(&log));
        Ok(log)
    }

    fn stats(&mut self, descriptors: bool, reply: Reply<StatsResponse>) {
        let up = match self.up() {
            Ok(up) => up.clone(),
            Err(error) => {
                let _ = reply.send(Err(error)); // The client may have gone.
                return;
            }
        };
        self.tasks.spawn(async move {
            let mut client = up.guest.client();
            let answer = client.stats(StatsRequest { container_ids: Vec::new(), descriptors });
            let failed = |source: GuestError| SandboxError::Guest { doing: "cannot read the counters", source };
            let _ = reply.send(Guest::call("Stats", SHORT, answer).await.map_err(failed)); // As above.
        });
    }
}
