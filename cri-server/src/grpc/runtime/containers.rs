//! Containers: create, start, stop, remove, show.

use std::collections::HashMap;
use std::time::Duration;

use tonic::Status;

use super::{Sandboxes, failed, gone_is_fine, limit};
use crate::cri;
use crate::grpc::{Batches, batches, convert, info, observe, status};
use crate::sandbox::command::Command;

impl Sandboxes {
    /// CreateContainer.
    pub(super) async fn create_container(
        &self,
        request: cri::CreateContainerRequest,
    ) -> Result<cri::CreateContainerResponse, Status> {
        let config = request.config.ok_or_else(|| status::invalid("config is missing"))?;
        observe("CreateContainer", &request.pod_sandbox_id, async {
            let sandbox = self.runtime.context().index.sandbox(&request.pod_sandbox_id).map_err(failed)?;
            let command = |reply| Command::Create(Box::new(config), reply);
            let id = self.runtime.ask(&sandbox.id, command).await.map_err(failed)?;
            Ok(cri::CreateContainerResponse { container_id: id.to_string() })
        })
        .await
    }

    /// StartContainer.
    pub(super) async fn start_container(
        &self,
        request: cri::StartContainerRequest,
    ) -> Result<cri::StartContainerResponse, Status> {
        let id = request.container_id;
        observe("StartContainer", &id, async {
            let (sandbox, container) = self.existing(&id)?;
            self.runtime.ask(&sandbox, |reply| Command::Start(container, reply)).await.map_err(failed)?;
            Ok(cri::StartContainerResponse {})
        })
        .await
    }

    /// StopContainer.
    pub(super) async fn stop_container(
        &self,
        request: cri::StopContainerRequest,
    ) -> Result<cri::StopContainerResponse, Status> {
        observe("StopContainer", &request.container_id, async {
            if let Some((sandbox, container)) = self.container(&request.container_id)? {
                let grace = limit(request.timeout).unwrap_or(Duration::ZERO);
                let command = |reply| Command::StopContainer(container, grace, reply);
                gone_is_fine(self.runtime.ask(&sandbox, command).await)?;
            }
            Ok(cri::StopContainerResponse {})
        })
        .await
    }

    /// RemoveContainer.
    pub(super) async fn remove_container(
        &self,
        request: cri::RemoveContainerRequest,
    ) -> Result<cri::RemoveContainerResponse, Status> {
        let id = request.container_id;
        observe("RemoveContainer", &id, async {
            if let Some((sandbox, container)) = self.container(&id)? {
                let command = |reply| Command::RemoveContainer(container, reply);
                gone_is_fine(self.runtime.ask(&sandbox, command).await)?;
            }
            Ok(cri::RemoveContainerResponse {})
        })
        .await
    }

    /// ListContainers.
    pub(super) async fn list_containers(
        &self,
        request: cri::ListContainersRequest,
    ) -> Result<cri::ListContainersResponse, Status> {
        let containers = self.container_list(request.filter);
        Ok(cri::ListContainersResponse { containers })
    }

    /// StreamContainers.
    pub(super) async fn stream_containers(
        &self,
        request: cri::StreamContainersRequest,
    ) -> Result<Batches<cri::StreamContainersResponse>, Status> {
        let list = self.container_list(request.filter);
        Ok(batches(list, |containers| cri::StreamContainersResponse { containers }))
    }

    /// ContainerStatus.
    pub(super) async fn container_status(
        &self,
        request: cri::ContainerStatusRequest,
    ) -> Result<cri::ContainerStatusResponse, Status> {
        let record = self.runtime.context().index.container(&request.container_id).map_err(failed)?;
        let info = if request.verbose {
            let sandbox = self.runtime.context().index.sandbox(record.sandbox.as_str()).ok();
            info::of_container(&record, sandbox.as_deref())
        } else {
            HashMap::new()
        };
        Ok(cri::ContainerStatusResponse { status: Some(convert::container_status(&record)), info })
    }

    /// ReopenContainerLog.
    pub(super) async fn reopen_container_log(
        &self,
        request: cri::ReopenContainerLogRequest,
    ) -> Result<cri::ReopenContainerLogResponse, Status> {
        let id = request.container_id;
        observe("ReopenContainerLog", &id, async {
            let (sandbox, container) = self.existing(&id)?;
            self.runtime.ask(&sandbox, |reply| Command::ReopenLog(container, reply)).await.map_err(failed)?;
            Ok(cri::ReopenContainerLogResponse {})
        })
        .await
    }

    /// CheckpointContainer.
    pub(super) async fn checkpoint_container(
        &self,
        _: cri::CheckpointContainerRequest,
    ) -> Result<cri::CheckpointContainerResponse, Status> {
        Err(status::unimplemented("CheckpointContainer: there is no checkpoint of one container of a VM"))
    }

    fn container_list(&self, filter: Option<cri::ContainerFilter>) -> Vec<cri::Container> {
        let filter = filter.unwrap_or_default();
        let containers = self.runtime.context().index.containers();
        containers
            .iter()
            .filter(|record| convert::container_matches(record, &filter))
            .map(|record| convert::container_item(record))
            .collect()
    }
}
