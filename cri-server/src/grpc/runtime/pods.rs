//! Sandboxes: run, stop, remove, show.

use std::collections::HashMap;

use tonic::Status;

use super::{Sandboxes, failed, gone_is_fine};
use crate::cri;
use crate::grpc::{Batches, batches, convert, info, observe, status};
use crate::sandbox::command::Command;
use crate::sandbox::now;

impl Sandboxes {
    /// RunPodSandbox.
    pub(super) async fn run_pod_sandbox(
        &self,
        request: cri::RunPodSandboxRequest,
    ) -> Result<cri::RunPodSandboxResponse, Status> {
        let config = request.config.ok_or_else(|| status::invalid("config is missing"))?;
        let name = config.metadata.as_ref().map(|metadata| format!("{}/{}", metadata.namespace, metadata.name));
        observe("RunPodSandbox", &name.unwrap_or_default(), async {
            let id = self.runtime.run_sandbox(config, request.runtime_handler).await.map_err(failed)?;
            Ok(cri::RunPodSandboxResponse { pod_sandbox_id: id.to_string() })
        })
        .await
    }

    /// StopPodSandbox.
    pub(super) async fn stop_pod_sandbox(
        &self,
        request: cri::StopPodSandboxRequest,
    ) -> Result<cri::StopPodSandboxResponse, Status> {
        let id = request.pod_sandbox_id;
        observe("StopPodSandbox", &id, async {
            if let Some(sandbox) = self.sandbox(&id)? {
                gone_is_fine(self.runtime.ask(&sandbox, Command::Stop).await)?;
            }
            Ok(cri::StopPodSandboxResponse {})
        })
        .await
    }

    /// RemovePodSandbox.
    pub(super) async fn remove_pod_sandbox(
        &self,
        request: cri::RemovePodSandboxRequest,
    ) -> Result<cri::RemovePodSandboxResponse, Status> {
        let id = request.pod_sandbox_id;
        observe("RemovePodSandbox", &id, async {
            if let Some(sandbox) = self.sandbox(&id)? {
                gone_is_fine(self.runtime.ask(&sandbox, Command::Remove).await)?;
            }
            Ok(cri::RemovePodSandboxResponse {})
        })
        .await
    }

    /// PodSandboxStatus.
    pub(super) async fn pod_sandbox_status(
        &self,
        request: cri::PodSandboxStatusRequest,
    ) -> Result<cri::PodSandboxStatusResponse, Status> {
        let context = self.runtime.context();
        let record = context.index.sandbox(&request.pod_sandbox_id).map_err(failed)?;
        let timestamp = now();
        let containers = context.index.containers_of(&record.id);
        let info = if request.verbose { info::of_sandbox(context, &record) } else { HashMap::new() };
        Ok(cri::PodSandboxStatusResponse {
            status: Some(convert::sandbox_status(&record)),
            info,
            containers_statuses: containers.iter().map(|container| convert::container_status(container)).collect(),
            timestamp,
        })
    }

    /// ListPodSandbox.
    pub(super) async fn list_pod_sandbox(
        &self,
        request: cri::ListPodSandboxRequest,
    ) -> Result<cri::ListPodSandboxResponse, Status> {
        Ok(cri::ListPodSandboxResponse { items: self.pod_list(request.filter) })
    }

    /// StreamPodSandboxes.
    pub(super) async fn stream_pod_sandboxes(
        &self,
        request: cri::StreamPodSandboxesRequest,
    ) -> Result<Batches<cri::StreamPodSandboxesResponse>, Status> {
        let list = self.pod_list(request.filter);
        let message = |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes };
        Ok(batches(list, message))
    }

    fn pod_list(&self, filter: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let sandboxes = self.runtime.context().index.sandboxes();
        sandboxes
            .iter()
            .filter(|record| convert::sandbox_matches(record, &filter))
            .map(|record| convert::sandbox_item(record))
            .collect()
    }
}
