//! How a sandbox ends: its stop, the end of its VM, its removal.

use std::time::Duration;

use isopod_proto::ObjectId;
use isopod_proto::agent::{ShutdownRequest, SignalRequest};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::driver::{Container, Driver};
use super::operations::SIGKILL;
use super::{SandboxError, SandboxPhase, now, resources};
use crate::cgroup;
use crate::container::ContainerState;
use crate::grpc::status::chain;
use crate::guest::{Guest, GuestError, SHORT};
use crate::oom;
use crate::vmm::{self, VmEnd};

/// How long all containers of a stopped sandbox may take.
const STOP_DEADLINE: Duration = Duration::from_secs(15);
/// How long the guest of a stopped sandbox may take to kill them.
const LAST_KILL_DEADLINE: Duration = Duration::from_secs(5);
/// How long the guest may take to power off, and then the VMM to end.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(10);

impl Driver {
    /// Handles events until none of `ids` runs, or the deadline, or there is something more urgent.
    pub(super) async fn until_ended(&mut self, ids: &[ObjectId], deadline: Duration, give_up: CancellationToken) {
        let deadline = Instant::now() + deadline;
        while ids.iter().any(|id| self.containers.get(id).is_some_and(Container::is_running)) {
            tokio::select! {
                event = timeout_at(deadline, self.events.recv()) => match event {
                    Ok(Some(event)) => Box::pin(self.handle(event)).await,
                    Ok(None) | Err(_) => return,
                },
                () = give_up.cancelled() => return,
            }
        }
    }

    /// Kills all of `ids`, though the sandbox is to be stopped. Whether the guest has answered.
    async fn kill_all(&self, ids: &[ObjectId]) -> bool {
        let Ok(up) = self.up() else { return false };
        let mut answered = false;
        let kill = |id: &ObjectId| {
            let (mut client, process_id) = (up.guest.client(), id.to_string());
            async move {
                let answer = client.signal(SignalRequest { process_id, signal: SIGKILL, all: true });
                Guest::call("Signal", LAST_KILL_DEADLINE, answer).await
            }
        };
        for result in futures_util::future::join_all(ids.iter().map(kill)).await {
            answered |= !matches!(result, Err(GuestError::Deadline { .. }));
            if let Err(error) = result {
                // It may just have ended. If not, it is killed with the VM.
                tracing::info!(error = chain(&error), "a container of a stopped sandbox was not killed");
            }
        }
        answered
    }

    /// StopPodSandbox.
    pub(super) async fn stop(&mut self) -> Result<(), SandboxError> {
        if self.record.phase == SandboxPhase::Ready {
            let running = self.running();
            // A guest that does not answer will not tell of their end either.
            if self.kill_all(&running).await {
                self.until_ended(&running, STOP_DEADLINE, CancellationToken::new()).await;
            }
            self.power_off().await;
            self.vm_ended(&VmEnd { message: "the sandbox was stopped".to_owned(), console: String::new() }).await;
        }
        resources::release(&self.context, &self.record).await?;
        self.record.network = None;
        self.record.cgroup = None;
        self.record.vm = None;
        self.record.file_server = None;
        self.save().await
    }

    /// Asks the guest to power off, then the VMM to stop, then kills it.
    async fn power_off(&mut self) {
        let Some(up) = self.up.clone() else { return };
        let mut client = up.guest.client();
        let answer = tokio::select! {
            answer = Guest::call("Shutdown", POWER_OFF_DEADLINE, client.shutdown(ShutdownRequest {})) => answer,
            _ = up.vm.ended() => return,
        };
        match answer {
            // Nor will it power off.
            Err(error @ GuestError::Deadline { .. }) => tracing::warn!(%error, "the guest does not power off"),
            answer => {
                if let Err(error) = answer {
                    tracing::debug!(%error, "the guest did not say that it powers off");
                }
                if timeout(POWER_OFF_DEADLINE, up.vm.ended()).await.is_ok() {
                    return;
                }
                tracing::warn!("the guest does not power off; its VM is stopped");
            }
        }
        let stopped = async {
            if let Err(error) = vmm::stop(up.vm.directory()).await {
                tracing::warn!(error = chain(&error), "the VM cannot be stopped");
                return;
            }
            up.vm.ended().await;
        };
        // It is the VMM's own process, whatever has become of what runs in it.
        if timeout(POWER_OFF_DEADLINE, stopped).await.is_err() || up.vm.end().is_none() {
            tracing::warn!("the VM does not stop, and is killed");
            up.vm.kill();
            let _ = timeout(POWER_OFF_DEADLINE, up.vm.ended()).await; // Looked at once more when it is released.
        }
    }

    /// The VM has ended, or is to be taken as ended: nothing in it runs.
    pub(super) async fn vm_ended(&mut self, end: &VmEnd) {
        if self.record.phase != SandboxPhase::Ready {
            return;
        }
        let running = self.running();
        let oom_killed = !running.is_empty() && self.oom_killed().await;
        let reason = if oom_killed { format!("{}, for want of memory", end.message) } else { end.message.clone() };
        tracing::info!(reason, console = end.console, "the sandbox's VM ended");
        self.up = None;
        self.disks.clear();
        self.mirrors.clear();
        self.empty_dirs.clear();
        self.until_logged(&running).await;
        let mut ended = Vec::new();
        for container in self.containers.values_mut().filter(|container| container.is_running()) {
            let exit = container.record.state.lost(now(), oom_killed, format!("the sandbox's VM ended: {reason}"));
            tracing::info!(container = %container.record.id, exit_code = exit.exit_code, reason = exit.reason, "container ended");
            container.record.state = ContainerState::Exited(exit);
            ended.push(container.record.clone());
        }
        self.record.phase = SandboxPhase::NotReady;
        if let Err(error) = self.context.store.put_end(&self.record, &ended).await {
            // Shown all the same: it is true, and a later daemon finds it out again.
            tracing::error!(error = chain(&error), "the end of a sandbox is not kept");
        }
        ended.iter().for_each(|container| self.context.index.publish_container(container));
        self.context.index.publish_sandbox(&self.record);
        for container in self.containers.values_mut().filter(|container| running.contains(&container.record.id)) {
            container.over();
        }
    }

    /// Waits until all that these containers have printed is in their logs. Their streams have ended with the VM, so that it takes a moment.
    async fn until_logged(&mut self, ids: &[ObjectId]) {
        let followers = ids.iter().filter_map(|id| self.containers.get_mut(id)?.follower.take());
        let logged = followers.map(|follower| async {
            let abort = follower.abort_handle();
            if timeout(SHORT, follower).await.is_err() {
                abort.abort();
            }
        });
        futures_util::future::join_all(logged).await;
    }

    /// Whether the kernel killed the VMM for want of memory, as far as that is known.
    async fn oom_killed(&self) -> bool {
        let (Some(cgroup), Some(vmm)) = (&self.record.cgroup, self.record.vm) else { return false };
        match cgroup::oom_killed(cgroup) {
            Some(killed) => killed,
            None => tokio::task::spawn_blocking(move || oom::killed(vmm)).await.unwrap_or_default(),
        }
    }

    /// RemovePodSandbox.
    pub(super) async fn remove(&mut self) -> Result<(), SandboxError> {
        self.stop().await?;
        for id in self.containers.keys() {
            self.context.store.remove_container(id).await?;
            self.context.index.remove_container(id);
        }
        self.containers.clear();
        self.context.store.remove_sandbox(&self.record.id).await?;
        self.context.index.remove_sandbox(&self.record.id);
        self.context.users.release(&self.record.id);
        Ok(())
    }
}
