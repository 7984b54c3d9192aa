//! What a driver does to the containers that it has created.

use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ObjectId;
use isopod_proto::agent::{self, RemoveContainerRequest, SignalRequest, StartContainerRequest, WaitProcessResponse};
use prost::Message;

use super::admission::{ContainerPhase, Request};
use super::attach;
use super::bring_up::Up;
use super::command::{Event, Reply};
use super::driver::{Container, Driver};
use super::exec::{self, Outcome};
use super::{SandboxError, now, resources};
use crate::container::{ContainerState, Exit, SpecError, exec_process};
use crate::grpc::status::chain;
use crate::guest::{GuestError, LONG, SHORT};
use crate::streaming::requests::Wanted;

pub(super) const SIGKILL: u32 = 9;
/// How long a killed container may take to end, with its log.
const KILL_DEADLINE: Duration = Duration::from_secs(60);

fn guest_failed(doing: &'static str) -> impl FnOnce(GuestError) -> SandboxError {
    move |source| SandboxError::Guest { doing, source }
}

fn not_found(id: &ObjectId) -> SandboxError {
    SandboxError::NotFound { what: "container", id: id.to_string() }
}

impl Driver {
    /// StartContainer.
    pub(super) async fn start_container(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        let phase = ContainerPhase::from(&container.record.state);
        self.admit(id, Request::StartContainer(phase))?;
        let result = self.start_process(id).await;
        let state = match &result {
            Ok(()) => ContainerState::Running { started_at: now() },
            Err(error) => ContainerState::start_failed(now(), chain(error)),
        };
        self.set_state(id, state).await?;
        result?;
        self.follow(id)
    }

    async fn start_process(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        // The log is there when the call answers, even if the process has no word to say.
        self.open_log(id)?;
        let mut client = self.up()?.guest.client();
        let answer = client.start_container(StartContainerRequest { id: id.to_string() });
        self.call("StartContainer", LONG, answer).await.map(drop).map_err(guest_failed("cannot start the container"))
    }

    pub(super) async fn set_state(&mut self, id: &ObjectId, state: ContainerState) -> Result<(), SandboxError> {
        let Some(container) = self.containers.get_mut(id) else { return Ok(()) };
        container.record.state = state;
        let record = container.record.clone();
        self.save_container(&record).await
    }

    /// A container's process has ended.
    pub(super) async fn container_ended(&mut self, id: &ObjectId, end: &WaitProcessResponse) {
        let Some(container) = self.containers.get(id).filter(|container| container.is_running()) else { return };
        // Whatever the guest's clock says, it is not later than now.
        let exit = container.record.state.ended(end.exit_code, end.oom_killed, end.finished_at_nanos.min(now()));
        tracing::info!(container = %id, exit_code = exit.exit_code, reason = exit.reason, "container ended");
        self.exit(id, exit).await;
    }

    /// The agent does not know a container's process any more.
    pub(super) async fn container_lost(&mut self, id: &ObjectId, message: String) {
        let Some(container) = self.containers.get(id).filter(|container| container.is_running()) else { return };
        let exit = container.record.state.unknown(now(), message);
        self.exit(id, exit).await;
    }

    pub(super) async fn exit(&mut self, id: &ObjectId, exit: Exit) {
        if let Err(error) = self.set_state(id, ContainerState::Exited(exit)).await {
            // Shown all the same: it is true, and a later daemon finds it out again.
            tracing::error!(container = %id, error = chain(&error), "the end of a container is not kept");
            if let Some(container) = self.containers.get(id) {
                self.context.index.publish_container(&container.record);
            }
        }
        self.release_cpu_sets().await;
        if let Some(container) = self.containers.get_mut(id) {
            container.over();
        }
    }

    /// StopContainer: asks once, kills after the grace, answers after the end.
    pub(super) async fn stop_container(&mut self, id: &ObjectId, grace: Duration, reply: Reply<()>) {
        let Some(container) = self.containers.get_mut(id) else {
            let _ = reply.send(Err(not_found(id))); // The client may have gone.
            return;
        };
        let phase = ContainerPhase::from(&container.record.state);
        if phase != ContainerPhase::Running {
            let _ = reply.send(Ok(())); // As above.
            return;
        }
        container.stop_replies.push(reply);
        if grace.is_zero() {
            self.kill_container(id).await;
            return;
        }
        if !std::mem::replace(&mut container.stop_sent, true) {
            let signal = container.record.stop_signal;
            self.signal(id, signal, false).await;
        }
        self.later(grace, Event::GraceOver(id.clone()));
    }

    /// Kills every process of the container.
    pub(super) async fn kill_container(&mut self, id: &ObjectId) {
        if self.containers.get(id).is_some_and(Container::is_running) {
            self.signal(id, SIGKILL, true).await;
            self.later(KILL_DEADLINE, Event::KillOverdue(id.clone()));
        }
    }

    fn later(&mut self, delay: Duration, event: Event) {
        let sender = self.sender.clone();
        self.tasks.spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = sender.send(event); // The driver may end first.
        });
    }

    async fn signal(&self, id: &ObjectId, signal: u32, all: bool) {
        let Ok(up) = self.up() else { return };
        let mut client = up.guest.client();
        let answer = client.signal(SignalRequest { process_id: id.to_string(), signal, all });
        if let Err(error) = self.call("Signal", SHORT, answer).await {
            // It may just have ended. If not, it is killed when its time is up, and its VM with the sandbox.
            tracing::info!(container = %id, signal, error = chain(&error), "a signal was not sent");
        }
    }

    /// RemoveContainer.
    pub(super) async fn remove_container(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        let Some(container) = self.containers.get(id) else { return Ok(()) };
        if container.is_running() {
            self.kill_container(id).await;
            self.until_ended(std::slice::from_ref(id), KILL_DEADLINE, self.stopping.clone()).await;
            if self.containers.get(id).is_some_and(Container::is_running) {
                let seconds = KILL_DEADLINE.as_secs();
                return Err(SandboxError::Late { what: "the end of a killed container", seconds });
            }
        }
        self.remove_in_guest(id).await;
        self.release_volumes(id).await;
        self.context.store.remove_container(id).await?;
        self.containers.remove(id);
        self.context.index.remove_container(id);
        let progress = resources::directory(&self.context, &self.record.id).join(format!("{}.progress", id.short()));
        let _ = std::fs::remove_file(progress); // There is none if it never ran.
        self.release_cpu_sets().await;
        self.detach_unused().await;
        self.release_mirrors().await;
        Ok(())
    }

    pub(super) async fn remove_in_guest(&self, id: &ObjectId) {
        let Ok(up) = self.up() else { return };
        let mut client = up.guest.client();
        let answer = client.remove_container(RemoveContainerRequest { id: id.to_string() });
        if let Err(error) = self.call("RemoveContainer", LONG, answer).await {
            tracing::warn!(container = %id, error = chain(&error), "the guest keeps a removed container");
        }
    }

    /// ReopenContainerLog.
    pub(super) fn reopen_log(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        self.admit(id, Request::ReopenLog(ContainerPhase::from(&container.record.state)))?;
        match &container.log {
            Some(log) => Ok(log.reopen()?),
            None => self.open_log(id).map(drop),
        }
    }

    /// ExecSync, in a task of its own.
    pub(super) fn exec(&mut self, id: &ObjectId, command: Vec<String>, limit: Option<Duration>, reply: Reply<Outcome>) {
        let terminal = self.containers.get(id).is_some_and(|container| container.record.config.tty);
        match self.exec_command(id, command, Wanted { tty: terminal, ..Wanted::default() }, limit) {
            Ok((up, command)) => {
                self.tasks.spawn(exec::run(up, command, reply));
            }
            Err(error) => {
                let _ = reply.send(Err(error)); // The client may have gone.
            }
        }
    }

    fn exec_command(
        &self,
        id: &ObjectId,
        command: Vec<String>,
        wanted: Wanted,
        limit: Option<Duration>,
    ) -> Result<(Up, exec::Command), SandboxError> {
        let record = &self.containers.get(id).ok_or_else(|| not_found(id))?.record;
        self.admit(id, Request::Exec(ContainerPhase::from(&record.state)))?;
        // What we wrote ourselves is whole; an empty process would be refused by the agent.
        let first = agent::Process::decode(record.process.as_slice()).unwrap_or_default();
        let process = exec_process(&first, command, wanted.tty, wanted.stdin);
        Ok((self.up()?.clone(), exec::Command { container: id.clone(), process, limit }))
    }

    /// Exec: what its client will run.
    pub(super) fn open_exec(
        &self,
        id: &ObjectId,
        command: Vec<String>,
        wanted: Wanted,
    ) -> Result<(Up, exec::Command), SandboxError> {
        self.exec_command(id, command, wanted, None)
    }

    /// Attach: the container's streams. What was asked for has to fit what the container has.
    pub(super) fn open_attach(&self, id: &ObjectId, wanted: Wanted) -> Result<attach::Target, SandboxError> {
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        self.admit(id, Request::Exec(ContainerPhase::from(&container.record.state)))?;
        let config = &container.record.config;
        let unfit =
            |field, problem: &str| SandboxError::Spec(SpecError::Invalid { field, problem: problem.to_owned() });
        if wanted.tty != config.tty {
            return Err(unfit(
                "tty",
                if config.tty { "the container has a terminal" } else { "the container has none" },
            ));
        }
        if wanted.stdin && !config.stdin {
            return Err(unfit("stdin", "the container was created without standard input"));
        }
        // It is there while the container is followed.
        let log = container.log.as_ref().ok_or(SandboxError::Ended)?;
        Ok(attach::Target {
            up: self.up()?.clone(),
            container: id.clone(),
            output: log.attachers().subscribe(),
            input: Arc::clone(&container.input),
            stdin_once: config.stdin_once,
        })
    }
}
