//! What a driver does first for a sandbox that it takes over from an earlier daemon. That one may have been killed between a change
//! in the guest and the record of it; what the records do not know is found out, and either recorded or removed.

use isopod_proto::ObjectId;
use isopod_proto::agent::present_container::Stage;
use isopod_proto::agent::{InventoryRequest, InventoryResponse, PresentContainer};
use tokio::time::Instant;

use super::bring_up::SCRATCH_DISK;
use super::driver::Driver;
use super::empty_dirs::DISK_PREFIX;
use super::{exec, now};
use crate::container::ContainerState;
use crate::grpc::status::chain;
use crate::guest::SHORT;
use crate::vmm;

/// Containers and processes of a guest that are looked at: more than a pod ever has under way.
const MOST: usize = 256;

impl Driver {
    /// Brings the records and the guest together.
    pub(super) async fn adopt(&mut self) {
        self.adopt_disks().await;
        let Ok(up) = self.up() else { return };
        let mut client = up.guest.client();
        let asked = self.call("Inventory", SHORT, client.inventory(InventoryRequest {}));
        match asked.await {
            Ok(InventoryResponse { containers, exec_process_ids }) => {
                for container in containers.into_iter().take(MOST) {
                    // The sandbox's clients wait meanwhile, which is not for the guest to prolong.
                    if Instant::now() >= self.patience {
                        tracing::warn!("the guest takes too long; what else it has is left alone");
                        break;
                    }
                    self.adopt_container(&container).await;
                }
                self.end_commands(exec_process_ids);
            }
            // An agent of an earlier version, or one that does not answer, which the next request will tell.
            Err(error) => tracing::warn!(error = chain(&error), "what the guest has is not known"),
        }
        self.detach_unused().await;
    }

    /// The disks in the VM that go when no container uses them. One may have been plugged in for a container that was never made.
    async fn adopt_disks(&mut self) {
        let Ok(up) = self.up() else { return };
        match vmm::disks(up.vm.directory()).await {
            Ok(disks) => {
                let passing = |disk: &&String| *disk != SCRATCH_DISK && !disk.starts_with(DISK_PREFIX);
                let disks = disks.iter().filter(passing).filter_map(|disk| isopod_proto::DiskId::parse(disk).ok());
                self.disks = disks.collect();
            }
            Err(error) => tracing::warn!(error = chain(&error), "the disks of the VM are not known"),
        }
    }

    async fn adopt_container(&mut self, present: &PresentContainer) {
        let Ok(id) = ObjectId::parse(&present.id) else { return };
        let Some(container) = self.containers.get(&id) else {
            tracing::info!(container = %id, "removing a container whose creation was cut off");
            self.remove_in_guest(&id).await;
            self.release_volumes(&id).await;
            return;
        };
        if container.record.state != ContainerState::Created {
            return;
        }
        let state = match present.stage() {
            Stage::Created => return,
            Stage::Started => {
                // The guest's clock may be a little off, or far, and this machine's may have been set back.
                let started_at = present.started_at_nanos.min(now()).max(container.record.created_at);
                ContainerState::Running { started_at }
            }
            Stage::Failed => {
                let message = "it could not be started; why was lost with the daemon that started it";
                ContainerState::start_failed(now(), message.to_owned())
            }
        };
        tracing::info!(container = %id, ?state, "a start that was cut off");
        let runs = matches!(state, ContainerState::Running { .. });
        let recorded = match self.set_state(&id, state).await {
            Ok(()) if runs => self.follow(&id),
            recorded => recorded,
        };
        if let Err(error) = recorded {
            tracing::error!(container = %id, error = chain(&error), "a container is not followed");
        }
    }

    /// Ends the commands of clients that went with the daemon.
    fn end_commands(&mut self, processes: Vec<String>) {
        let Ok(up) = self.up().cloned() else { return };
        if processes.is_empty() {
            return;
        }
        self.tasks.spawn(async move {
            for process in processes.into_iter().take(MOST) {
                exec::clean_up(&up, process, true).await;
            }
        });
    }
}
