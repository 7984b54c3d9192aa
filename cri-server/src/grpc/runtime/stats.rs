//! Counters of containers and sandboxes, as the guests know them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ObjectId;
use isopod_proto::agent::StatsResponse;
use tonic::Status;

use super::{Sandboxes, failed};
use crate::container::{ContainerRecord, ContainerState};
use crate::cri;
use crate::grpc::{Batches, batches, convert, counters, status};
use crate::sandbox::command::Command;
use crate::sandbox::{SandboxError, SandboxPhase, SandboxRecord};

/// How long a guest may take, with all that its sandbox has to do before. The kubelet asks every ten seconds.
const DEADLINE: Duration = Duration::from_secs(10);

impl Sandboxes {
    /// ContainerStats.
    pub(super) async fn container_stats(
        &self,
        request: cri::ContainerStatsRequest,
    ) -> Result<cri::ContainerStatsResponse, Status> {
        let context = self.runtime.context();
        let record = context.index.container(&request.container_id).map_err(failed)?;
        let stats = if is_running(&record) {
            let guest = self.guest_counters(&record.sandbox, false).await.map_err(failed)?;
            counters::containers(std::slice::from_ref(&record), &guest, &context.config.root).pop()
        } else {
            None
        };
        Ok(cri::ContainerStatsResponse { stats: Some(stats.unwrap_or_else(|| counters::without_counters(&record))) })
    }

    /// ListContainerStats.
    pub(super) async fn list_container_stats(
        &self,
        request: cri::ListContainerStatsRequest,
    ) -> Result<cri::ListContainerStatsResponse, Status> {
        Ok(cri::ListContainerStatsResponse { stats: self.stats(request.filter).await })
    }

    /// StreamContainerStats.
    pub(super) async fn stream_container_stats(
        &self,
        request: cri::StreamContainerStatsRequest,
    ) -> Result<Batches<cri::StreamContainerStatsResponse>, Status> {
        let list = self.stats(request.filter).await;
        let message = |container_stats| cri::StreamContainerStatsResponse { container_stats };
        Ok(batches(list, message))
    }

    /// PodSandboxStats.
    pub(super) async fn pod_sandbox_stats(
        &self,
        request: cri::PodSandboxStatsRequest,
    ) -> Result<cri::PodSandboxStatsResponse, Status> {
        let record = self.runtime.context().index.sandbox(&request.pod_sandbox_id).map_err(failed)?;
        let guest = self.guest_counters(&record.id, false).await.map_err(failed)?;
        Ok(cri::PodSandboxStatsResponse { stats: Some(self.pod(&record, &guest)) })
    }

    /// ListPodSandboxStats.
    pub(super) async fn list_pod_sandbox_stats(
        &self,
        request: cri::ListPodSandboxStatsRequest,
    ) -> Result<cri::ListPodSandboxStatsResponse, Status> {
        Ok(cri::ListPodSandboxStatsResponse { stats: self.pod_stats(request.filter).await })
    }

    /// StreamPodSandboxStats.
    pub(super) async fn stream_pod_sandbox_stats(
        &self,
        request: cri::StreamPodSandboxStatsRequest,
    ) -> Result<Batches<cri::StreamPodSandboxStatsResponse>, Status> {
        let list = self.pod_stats(request.filter).await;
        let message = |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse { pod_sandbox_stats };
        Ok(batches(list, message))
    }

    /// The statistics of the containers in `filter` that run.
    async fn stats(&self, filter: Option<cri::ContainerStatsFilter>) -> Vec<cri::ContainerStats> {
        let filter = filter.unwrap_or_default();
        let wanted = cri::ContainerFilter {
            id: filter.id,
            state: None,
            pod_sandbox_id: filter.pod_sandbox_id,
            label_selector: filter.label_selector,
        };
        let context = self.runtime.context();
        let mut by_sandbox: HashMap<ObjectId, Vec<_>> = HashMap::new();
        for record in context.index.containers() {
            if is_running(&record) && convert::container_matches(&record, &wanted) {
                by_sandbox.entry(record.sandbox.clone()).or_default().push(record);
            }
        }
        let guests = self.all_counters(by_sandbox.keys(), false).await;
        let of = |(id, guest): (ObjectId, StatsResponse)| {
            let records = by_sandbox.get(&id).map(Vec::as_slice).unwrap_or_default();
            counters::containers(records, &guest, &context.config.root)
        };
        guests.into_iter().flat_map(of).collect()
    }

    /// The statistics of the sandboxes in `filter` that run.
    async fn pod_stats(&self, filter: Option<cri::PodSandboxStatsFilter>) -> Vec<cri::PodSandboxStats> {
        let filter = filter.unwrap_or_default();
        let wanted = cri::PodSandboxFilter { id: filter.id, state: None, label_selector: filter.label_selector };
        let pods = self.ready(|record| convert::sandbox_matches(record, &wanted));
        let guests = self.all_counters(pods.keys(), false).await;
        guests.into_iter().filter_map(|(id, guest)| Some(self.pod(pods.get(&id)?, &guest))).collect()
    }

    fn pod(&self, record: &SandboxRecord, guest: &StatsResponse) -> cri::PodSandboxStats {
        let context = self.runtime.context();
        let containers = counters::containers(&self.running(&record.id), guest, &context.config.root);
        counters::pod(record, guest, containers)
    }

    /// The sandboxes whose guests run.
    pub(super) fn ready(&self, wanted: impl Fn(&SandboxRecord) -> bool) -> HashMap<ObjectId, Arc<SandboxRecord>> {
        let sandboxes = self.runtime.context().index.sandboxes().into_iter();
        sandboxes
            .filter(|record| record.phase == SandboxPhase::Ready && wanted(record))
            .map(|record| (record.id.clone(), record))
            .collect()
    }

    /// The containers of a sandbox that run.
    pub(super) fn running(&self, sandbox: &ObjectId) -> Vec<Arc<ContainerRecord>> {
        let mut containers = self.runtime.context().index.containers_of(sandbox);
        containers.retain(|record| is_running(record));
        containers
    }

    /// What one guest knows.
    async fn guest_counters(&self, sandbox: &ObjectId, descriptors: bool) -> Result<StatsResponse, SandboxError> {
        let asked = self.runtime.ask(sandbox, |reply| Command::Stats { descriptors, reply });
        let late =
            |_| SandboxError::Late { what: "an answer of the guest about its counters", seconds: DEADLINE.as_secs() };
        tokio::time::timeout(DEADLINE, asked).await.map_err(late)?
    }

    /// What the guests of `sandboxes` know, all asked at once. One that does not answer is left out with a warning.
    pub(super) async fn all_counters(
        &self,
        sandboxes: impl Iterator<Item = &ObjectId>,
        descriptors: bool,
    ) -> Vec<(ObjectId, StatsResponse)> {
        let asked = sandboxes.map(|sandbox| async move {
            match self.guest_counters(sandbox, descriptors).await {
                Ok(guest) => Some((sandbox.clone(), guest)),
                Err(error) => {
                    tracing::warn!(%sandbox, error = status::chain(&error), "no statistics of a sandbox");
                    None
                }
            }
        });
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }
}

fn is_running(record: &ContainerRecord) -> bool {
    matches!(record.state, ContainerState::Running { .. })
}
