//! How a driver begins: with a new sandbox, or with one of an earlier daemon.

use std::sync::Arc;

use super::bring_up::{Up, bring_up};
use super::driver::{Container, Driver};
use super::{SandboxError, SandboxPhase, SandboxRecord, resources};
use crate::cgroup::CpuSets;
use crate::container::{ContainerRecord, ContainerState};
use crate::context::Context;
use crate::grpc::status::chain;
use crate::guest::Guest;
use crate::vmm::{Vm, VmEnd};

impl Driver {
    /// Brings a new sandbox up. If that fails, everything is undone.
    pub async fn start(context: Arc<Context>, record: SandboxRecord) -> Result<Self, SandboxError> {
        let mut driver = Self::new(context, record);
        let failure = match bring_up(&driver.context, &mut driver.record).await {
            Ok(up) => {
                driver.up = Some(up);
                driver.cpu_sets = Some(CpuSets::default());
                driver.watch_vm();
                driver.record.phase = SandboxPhase::Ready;
                match driver.save().await {
                    Ok(()) => return Ok(driver),
                    Err(error) => error,
                }
            }
            Err(error) => SandboxError::BringUp(error),
        };
        driver.forget().await;
        Err(failure)
    }

    /// Undoes a sandbox that never became ready. Should that fail, the next start of the daemon tries again.
    async fn forget(&self) {
        if let Err(error) = resources::release(&self.context, &self.record).await {
            tracing::error!(error = chain(&error), "a sandbox that did not start is not undone");
            return;
        }
        if let Err(error) = self.context.store.remove_sandbox(&self.record.id).await {
            tracing::error!(error = chain(&error), "a sandbox that did not start is not forgotten");
            return;
        }
        self.context.users.release(&self.record.id);
    }

    /// Takes up a sandbox of an earlier daemon. None: it never became ready, and is undone.
    pub async fn resume(
        context: Arc<Context>,
        record: SandboxRecord,
        containers: Vec<ContainerRecord>,
    ) -> Option<Self> {
        if let Some(uid) = record.uid {
            context.users.keep(uid, &record.id);
        }
        let mut driver = Self::new(context, record);
        if driver.record.phase == SandboxPhase::Starting {
            driver.forget().await;
            return None;
        }
        driver.containers = containers.into_iter().map(|record| (record.id.clone(), Container::new(record))).collect();
        for container in driver.containers.values_mut() {
            // Whether its creation was answered is not known: who asks again gets it.
            container.delivered = container.record.state != ContainerState::Created;
        }
        for container in driver.containers.values() {
            driver.context.index.publish_container(&container.record);
        }
        driver.context.index.publish_sandbox(&driver.record);
        if driver.record.phase != SandboxPhase::Ready {
            return Some(driver);
        }
        let directory = resources::directory(&driver.context, &driver.record.id);
        match driver.record.vm.and_then(|identity| Vm::find(identity, &directory).ok()) {
            Some(vm) => {
                driver.up = Some(Up { vm: Arc::new(vm), guest: Guest::new(directory.join(crate::vmm::VSOCK_SOCKET)) });
                driver.disks = driver.containers.values().flat_map(|container| container.record.disks()).collect();
                driver.taken_over = true;
                driver.release_cpu_sets().await;
                driver.resume_mirrors();
                driver.watch_vm();
                for id in driver.running() {
                    if let Err(error) = driver.follow(&id) {
                        tracing::error!(container = %id, error = chain(&error), "a container is not followed");
                    }
                }
            }
            None => {
                let message = "it ended while the daemon did not run".to_owned();
                driver.vm_ended(&VmEnd { message, console: String::new() }).await;
            }
        }
        Some(driver)
    }
}
