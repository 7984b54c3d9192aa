//! The RuntimeService.

use std::collections::HashMap;
use std::time::Duration;

use isopod_proto::{ErrorKind, ObjectId};
use tonic::{Request, Response, Status};

use super::{Batches, Failure, convert, observe, status};
use crate::check::{self, Finding};
use crate::container::ContainerState;
use crate::cri;
use crate::runtime::{HANDLERS, Runtime};
use crate::sandbox::driver::Command;

/// Version of the kubelet's runtime API; the kubelet insists on it (cri.md 1.1).
const KUBELET_API_VERSION: &str = "0.1.0";

/// Serves sandboxes and containers.
pub struct Sandboxes {
    runtime: Runtime,
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

impl Sandboxes {
    /// The service over `runtime`.
    pub fn new(runtime: Runtime) -> Self {
        Self { runtime }
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

    async fn findings(&self) -> Vec<Finding> {
        let config = self.runtime.context().config.clone();
        // It opens devices and files, which may block.
        tokio::task::spawn_blocking(move || check::host(&config)).await.unwrap_or_default()
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

    fn pod_list(&self, filter: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let sandboxes = self.runtime.context().index.sandboxes();
        sandboxes
            .iter()
            .filter(|record| convert::sandbox_matches(record, &filter))
            .map(|record| convert::sandbox_item(record))
            .collect()
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

#[tonic::async_trait]
impl cri::runtime_service_server::RuntimeService for Sandboxes {
    type StreamPodSandboxesStream = Batches<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Batches<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Batches<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Batches<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Batches<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Batches<cri::ContainerEventResponse>;

    async fn version(&self, _: Request<cri::VersionRequest>) -> Reply<cri::VersionResponse> {
        Ok(Response::new(cri::VersionResponse {
            version: KUBELET_API_VERSION.to_owned(),
            runtime_name: "isopod".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Reply<cri::StatusResponse> {
        let findings = self.findings().await;
        let condition = |kind: &str, network: bool, reason: &str| {
            let problem = check::first_problem(&findings, network);
            cri::RuntimeCondition {
                r#type: kind.to_owned(),
                status: problem.is_none(),
                reason: if problem.is_some() { reason.to_owned() } else { String::new() },
                message: problem.unwrap_or_default(),
            }
        };
        let conditions =
            vec![condition("RuntimeReady", false, "HostNotReady"), condition("NetworkReady", true, "NetworkNotReady")];
        let mut info = HashMap::new();
        if request.into_inner().verbose {
            let config = serde_json::to_string(&self.runtime.context().config)
                .map_err(|_| status::internal("the configuration is not JSON"))?;
            info.insert("config".to_owned(), config);
        }
        let handler = |name: &str| cri::RuntimeHandler {
            name: name.to_owned(),
            features: Some(cri::RuntimeHandlerFeatures { recursive_read_only_mounts: false, user_namespaces: false }),
        };
        Ok(Response::new(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions }),
            info,
            runtime_handlers: HANDLERS.into_iter().map(handler).collect(),
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
            }),
        }))
    }

    async fn runtime_config(&self, _: Request<cri::RuntimeConfigRequest>) -> Reply<cri::RuntimeConfigResponse> {
        // The VMMs' cgroups are made as plain directories, which is the cgroupfs driver, whatever runs as init.
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: cri::CgroupDriver::Cgroupfs.into() };
        Ok(Response::new(cri::RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Reply<cri::UpdateRuntimeConfigResponse> {
        // The pods' subnet is the administrator's choice; a call must succeed all the same (cri.md 1.1).
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config).unwrap_or_default();
        tracing::info!(pod_cidr = network.pod_cidr, "the kubelet's pod CIDR is not used; network.subnet is");
        Ok(Response::new(cri::UpdateRuntimeConfigResponse {}))
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Reply<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| status::invalid("config is missing"))?;
        let name = config.metadata.as_ref().map(|metadata| format!("{}/{}", metadata.namespace, metadata.name));
        observe("RunPodSandbox", &name.unwrap_or_default(), async {
            let id = self.runtime.run_sandbox(config, request.runtime_handler).await.map_err(failed)?;
            Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id: id.to_string() }))
        })
        .await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Reply<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        observe("StopPodSandbox", &id, async {
            if let Some(sandbox) = self.sandbox(&id)? {
                gone_is_fine(self.runtime.ask(&sandbox, Command::Stop).await)?;
            }
            Ok(Response::new(cri::StopPodSandboxResponse {}))
        })
        .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Reply<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        observe("RemovePodSandbox", &id, async {
            if let Some(sandbox) = self.sandbox(&id)? {
                gone_is_fine(self.runtime.ask(&sandbox, Command::Remove).await)?;
            }
            Ok(Response::new(cri::RemovePodSandboxResponse {}))
        })
        .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Reply<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let record = self.runtime.context().index.sandbox(&request.pod_sandbox_id).map_err(failed)?;
        let info = if request.verbose { convert::sandbox_info(&record) } else { HashMap::new() };
        Ok(Response::new(cri::PodSandboxStatusResponse {
            status: Some(convert::sandbox_status(&record)),
            info,
            ..Default::default()
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Reply<cri::ListPodSandboxResponse> {
        Ok(Response::new(cri::ListPodSandboxResponse { items: self.pod_list(request.into_inner().filter) }))
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Reply<Self::StreamPodSandboxesStream> {
        let list = self.pod_list(request.into_inner().filter);
        let message = |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes };
        Ok(Response::new(super::batches(list, message)))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Reply<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| status::invalid("config is missing"))?;
        observe("CreateContainer", &request.pod_sandbox_id, async {
            let sandbox = self.runtime.context().index.sandbox(&request.pod_sandbox_id).map_err(failed)?;
            let command = |reply| Command::Create(Box::new(config), reply);
            let id = self.runtime.ask(&sandbox.id, command).await.map_err(failed)?;
            Ok(Response::new(cri::CreateContainerResponse { container_id: id.to_string() }))
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Reply<cri::StartContainerResponse> {
        let id = request.into_inner().container_id;
        observe("StartContainer", &id, async {
            let (sandbox, container) = self.existing(&id)?;
            self.runtime.ask(&sandbox, |reply| Command::Start(container, reply)).await.map_err(failed)?;
            Ok(Response::new(cri::StartContainerResponse {}))
        })
        .await
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Reply<cri::StopContainerResponse> {
        let request = request.into_inner();
        observe("StopContainer", &request.container_id, async {
            if let Some((sandbox, container)) = self.container(&request.container_id)? {
                let grace = limit(request.timeout).unwrap_or(Duration::ZERO);
                let command = |reply| Command::StopContainer(container, grace, reply);
                gone_is_fine(self.runtime.ask(&sandbox, command).await)?;
            }
            Ok(Response::new(cri::StopContainerResponse {}))
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Reply<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        observe("RemoveContainer", &id, async {
            if let Some((sandbox, container)) = self.container(&id)? {
                let command = |reply| Command::RemoveContainer(container, reply);
                gone_is_fine(self.runtime.ask(&sandbox, command).await)?;
            }
            Ok(Response::new(cri::RemoveContainerResponse {}))
        })
        .await
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Reply<cri::ListContainersResponse> {
        let containers = self.container_list(request.into_inner().filter);
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Reply<Self::StreamContainersStream> {
        let list = self.container_list(request.into_inner().filter);
        Ok(Response::new(super::batches(list, |containers| cri::StreamContainersResponse { containers })))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Reply<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        let record = self.runtime.context().index.container(&request.container_id).map_err(failed)?;
        let info = if request.verbose { convert::container_info(&record) } else { HashMap::new() };
        Ok(Response::new(cri::ContainerStatusResponse { status: Some(convert::container_status(&record)), info }))
    }

    async fn update_container_resources(
        &self,
        _: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Reply<cri::UpdateContainerResourcesResponse> {
        Err(status::unimplemented("UpdateContainerResources"))
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Reply<cri::ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        observe("ReopenContainerLog", &id, async {
            let (sandbox, container) = self.existing(&id)?;
            self.runtime.ask(&sandbox, |reply| Command::ReopenLog(container, reply)).await.map_err(failed)?;
            Ok(Response::new(cri::ReopenContainerLogResponse {}))
        })
        .await
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Reply<cri::ExecSyncResponse> {
        let request = request.into_inner();
        observe("ExecSync", &request.container_id, async {
            if request.cmd.is_empty() {
                return Err(status::invalid("cmd is empty"));
            }
            let (sandbox, container) = self.existing(&request.container_id)?;
            let command = |reply| Command::Exec(container, request.cmd, limit(request.timeout), reply);
            let outcome = self.runtime.ask(&sandbox, command).await.map_err(failed)?;
            Ok(Response::new(convert::exec_reply(outcome)))
        })
        .await
    }

    async fn exec(&self, _: Request<cri::ExecRequest>) -> Reply<cri::ExecResponse> {
        Err(status::unimplemented("Exec"))
    }

    async fn attach(&self, _: Request<cri::AttachRequest>) -> Reply<cri::AttachResponse> {
        Err(status::unimplemented("Attach"))
    }

    async fn port_forward(&self, _: Request<cri::PortForwardRequest>) -> Reply<cri::PortForwardResponse> {
        Err(status::unimplemented("PortForward"))
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Reply<cri::ContainerStatsResponse> {
        let record = self.runtime.context().index.container(&request.into_inner().container_id).map_err(failed)?;
        let filter = cri::ContainerStatsFilter { id: record.id.to_string(), ..Default::default() };
        let stats = self.stats(Some(filter)).await.pop();
        let attributes = || convert::without_counters(&record);
        Ok(Response::new(cri::ContainerStatsResponse { stats: Some(stats.unwrap_or_else(attributes)) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Reply<cri::ListContainerStatsResponse> {
        Ok(Response::new(cri::ListContainerStatsResponse { stats: self.stats(request.into_inner().filter).await }))
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Reply<Self::StreamContainerStatsStream> {
        let list = self.stats(request.into_inner().filter).await;
        let message = |container_stats| cri::StreamContainerStatsResponse { container_stats };
        Ok(Response::new(super::batches(list, message)))
    }

    async fn pod_sandbox_stats(&self, _: Request<cri::PodSandboxStatsRequest>) -> Reply<cri::PodSandboxStatsResponse> {
        Err(status::unimplemented("PodSandboxStats"))
    }

    async fn list_pod_sandbox_stats(
        &self,
        _: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Reply<cri::ListPodSandboxStatsResponse> {
        Err(status::unimplemented("ListPodSandboxStats"))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        _: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Reply<Self::StreamPodSandboxStatsStream> {
        Err(status::unimplemented("StreamPodSandboxStats"))
    }

    async fn checkpoint_container(
        &self,
        _: Request<cri::CheckpointContainerRequest>,
    ) -> Reply<cri::CheckpointContainerResponse> {
        Err(status::unimplemented("CheckpointContainer"))
    }

    async fn get_container_events(&self, _: Request<cri::GetEventsRequest>) -> Reply<Self::GetContainerEventsStream> {
        Err(status::unimplemented("GetContainerEvents"))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Reply<cri::ListMetricDescriptorsResponse> {
        Err(status::unimplemented("ListMetricDescriptors"))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Reply<cri::ListPodSandboxMetricsResponse> {
        Err(status::unimplemented("ListPodSandboxMetrics"))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Reply<Self::StreamPodSandboxMetricsStream> {
        Err(status::unimplemented("StreamPodSandboxMetrics"))
    }

    async fn update_pod_sandbox_resources(
        &self,
        _: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Reply<cri::UpdatePodSandboxResourcesResponse> {
        Err(status::unimplemented("UpdatePodSandboxResources"))
    }
}
