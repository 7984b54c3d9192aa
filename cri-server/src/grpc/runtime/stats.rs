//! Counters of containers and sandboxes, as the guests know them.

use std::collections::HashMap;

use isopod_proto::ObjectId;
use tonic::Status;

use super::{Sandboxes, failed};
use crate::container::ContainerState;
use crate::cri;
use crate::grpc::{Batches, batches, convert, status};
use crate::sandbox::driver::Command;

impl Sandboxes {
    /// ContainerStats.
    pub(super) async fn container_stats(
        &self,
        request: cri::ContainerStatsRequest,
    ) -> Result<cri::ContainerStatsResponse, Status> {
        let record = self.runtime.context().index.container(&request.container_id).map_err(failed)?;
        let filter = cri::ContainerStatsFilter { id: record.id.to_string(), ..Default::default() };
        let stats = self.stats(Some(filter)).await.pop();
        let attributes = || convert::without_counters(&record);
        Ok(cri::ContainerStatsResponse { stats: Some(stats.unwrap_or_else(attributes)) })
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
        _: cri::PodSandboxStatsRequest,
    ) -> Result<cri::PodSandboxStatsResponse, Status> {
        Err(status::unimplemented("PodSandboxStats"))
    }

    /// ListPodSandboxStats.
    pub(super) async fn list_pod_sandbox_stats(
        &self,
        _: cri::ListPodSandboxStatsRequest,
    ) -> Result<cri::ListPodSandboxStatsResponse, Status> {
        Err(status::unimplemented("ListPodSandboxStats"))
    }

    /// StreamPodSandboxStats.
    pub(super) async fn stream_pod_sandbox_stats(
        &self,
        _: cri::StreamPodSandboxStatsRequest,
    ) -> Result<Batches<cri::StreamPodSandboxStatsResponse>, Status> {
        Err(status::unimplemented("StreamPodSandboxStats"))
    }

    /// The counters of the containers in `filter` that run. A guest that does not answer is left out with a warning.
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
            if matches!(record.state, ContainerState::Running { .. }) && convert::container_matches(&record, &wanted) {
                by_sandbox.entry(record.sandbox.clone()).or_default().push(record);
            }
        }
        let asked = by_sandbox.into_iter().map(|(sandbox, records)| async move {
            match self.runtime.ask(&sandbox, Command::Stats).await {
                Ok(stats) => convert::stats(&records, &stats, &context.config.root),
                Err(error) => {
                    tracing::warn!(%sandbox, error = status::chain(&error), "no statistics of a sandbox");
                    Vec::new()
                }
            }
        });
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }
}
