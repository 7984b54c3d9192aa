//! The RuntimeService: one method a call, in the file of what it is about.

mod containers;
mod events;
mod features;
#[cfg(test)]
mod list_tests;
mod metrics;
mod node;
mod pods;
mod stats;
mod streaming;
mod update;

use std::time::Duration;

use isopod_proto::{ErrorKind, ObjectId};
use tonic::{Request, Response, Status};

use super::{Batches, Failure, status};
use crate::cri;
use crate::runtime::Runtime;
use crate::streaming::Streaming;

/// Serves sandboxes and containers.
pub struct Sandboxes {
    runtime: Runtime,
    streaming: Streaming,
}

type Reply<T> = Result<Response<T>, Status>;

fn failed(error: impl Failure) -> Status {
    status::of(&error)
}

/// "Not found" is a success of what is to be gone ("This call is idempotent, and must not return an error if …").
fn gone_is_fine<T: Default, E: Failure>(result: Result<T, E>) -> Result<T, Status> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(T::default()),
        other => other.map_err(failed),
    }
}

/// A limit in seconds; none if it is 0, which CRI means by it, or negative.
fn limit(seconds: i64) -> Option<Duration> {
    u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs)
}

/// The reply of a call.
async fn answer<T>(work: impl Future<Output = Result<T, Status>>) -> Reply<T> {
    work.await.map(Response::new)
}

impl Sandboxes {
    /// The service over `runtime`, whose streams `streaming` carries.
    pub fn new(runtime: Runtime, streaming: Streaming) -> Self {
        Self { runtime, streaming }
    }

    /// The id of the sandbox that `id` is or begins; none if there is none.
    fn sandbox(&self, id: &str) -> Result<Option<ObjectId>, Status> {
        match self.runtime.context().index.sandbox(id) {
            Ok(record) => Ok(Some(record.id.clone())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// The ids of the sandbox and the container for `id`; none if there is none.
    fn container(&self, id: &str) -> Result<Option<(ObjectId, ObjectId)>, Status> {
        match self.runtime.context().index.container(id) {
            Ok(record) => Ok(Some((record.sandbox.clone(), record.id.clone()))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// As [`Self::container`], where there has to be one.
    fn existing(&self, id: &str) -> Result<(ObjectId, ObjectId), Status> {
        let record = self.runtime.context().index.container(id).map_err(failed)?;
        Ok((record.sandbox.clone(), record.id.clone()))
    }
}

#[tonic::async_trait]
impl cri::runtime_service_server::RuntimeService for Sandboxes {
    type StreamPodSandboxesStream = Batches<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Batches<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Batches<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Batches<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Batches<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Batches<cri::ContainerEventResponse>;

    async fn version(&self, request: Request<cri::VersionRequest>) -> Reply<cri::VersionResponse> {
        answer(Self::version(self, request.into_inner())).await
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Reply<cri::StatusResponse> {
        answer(Self::status(self, request.into_inner())).await
    }

    async fn runtime_config(&self, request: Request<cri::RuntimeConfigRequest>) -> Reply<cri::RuntimeConfigResponse> {
        answer(Self::runtime_config(self, request.into_inner())).await
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Reply<cri::UpdateRuntimeConfigResponse> {
        answer(Self::update_runtime_config(self, request.into_inner())).await
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Reply<cri::RunPodSandboxResponse> {
        answer(Self::run_pod_sandbox(self, request.into_inner())).await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Reply<cri::StopPodSandboxResponse> {
        answer(Self::stop_pod_sandbox(self, request.into_inner())).await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Reply<cri::RemovePodSandboxResponse> {
        answer(Self::remove_pod_sandbox(self, request.into_inner())).await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Reply<cri::PodSandboxStatusResponse> {
        answer(Self::pod_sandbox_status(self, request.into_inner())).await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Reply<cri::ListPodSandboxResponse> {
        answer(Self::list_pod_sandbox(self, request.into_inner())).await
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Reply<Self::StreamPodSandboxesStream> {
        answer(Self::stream_pod_sandboxes(self, request.into_inner())).await
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Reply<cri::CreateContainerResponse> {
        answer(Self::create_container(self, request.into_inner())).await
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Reply<cri::StartContainerResponse> {
        answer(Self::start_container(self, request.into_inner())).await
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Reply<cri::StopContainerResponse> {
        answer(Self::stop_container(self, request.into_inner())).await
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Reply<cri::RemoveContainerResponse> {
        answer(Self::remove_container(self, request.into_inner())).await
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Reply<cri::ListContainersResponse> {
        answer(Self::list_containers(self, request.into_inner())).await
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Reply<Self::StreamContainersStream> {
        answer(Self::stream_containers(self, request.into_inner())).await
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Reply<cri::ContainerStatusResponse> {
        answer(Self::container_status(self, request.into_inner())).await
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Reply<cri::UpdateContainerResourcesResponse> {
        answer(Self::update_container_resources(self, request.into_inner())).await
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Reply<cri::ReopenContainerLogResponse> {
        answer(Self::reopen_container_log(self, request.into_inner())).await
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Reply<cri::ExecSyncResponse> {
        answer(Self::exec_sync(self, request.into_inner())).await
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Reply<cri::ExecResponse> {
        answer(Self::exec(self, request.into_inner())).await
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Reply<cri::AttachResponse> {
        answer(Self::attach(self, request.into_inner())).await
    }

    async fn port_forward(&self, request: Request<cri::PortForwardRequest>) -> Reply<cri::PortForwardResponse> {
        answer(Self::port_forward(self, request.into_inner())).await
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Reply<cri::ContainerStatsResponse> {
        answer(Self::container_stats(self, request.into_inner())).await
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Reply<cri::ListContainerStatsResponse> {
        answer(Self::list_container_stats(self, request.into_inner())).await
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Reply<Self::StreamContainerStatsStream> {
        answer(Self::stream_container_stats(self, request.into_inner())).await
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Reply<cri::PodSandboxStatsResponse> {
        answer(Self::pod_sandbox_stats(self, request.into_inner())).await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Reply<cri::ListPodSandboxStatsResponse> {
        answer(Self::list_pod_sandbox_stats(self, request.into_inner())).await
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Reply<Self::StreamPodSandboxStatsStream> {
        answer(Self::stream_pod_sandbox_stats(self, request.into_inner())).await
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Reply<cri::CheckpointContainerResponse> {
        answer(Self::checkpoint_container(self, request.into_inner())).await
    }

    async fn get_container_events(
        &self,
        request: Request<cri::GetEventsRequest>,
    ) -> Reply<Self::GetContainerEventsStream> {
        answer(Self::get_container_events(self, request.into_inner())).await
    }

    async fn list_metric_descriptors(
        &self,
        request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Reply<cri::ListMetricDescriptorsResponse> {
        answer(Self::list_metric_descriptors(self, request.into_inner())).await
    }

    async fn list_pod_sandbox_metrics(
        &self,
        request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Reply<cri::ListPodSandboxMetricsResponse> {
        answer(Self::list_pod_sandbox_metrics(self, request.into_inner())).await
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Reply<Self::StreamPodSandboxMetricsStream> {
        answer(Self::stream_pod_sandbox_metrics(self, request.into_inner())).await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Reply<cri::UpdatePodSandboxResourcesResponse> {
        answer(Self::update_pod_sandbox_resources(self, request.into_inner())).await
    }
}
