//! The gRPC service: wire types in, wire types out, errors to statuses. Each request runs in a task of its own, so a client
//! that goes away leaves nothing half done.

use std::future::Future;
use std::sync::Arc;

use isopod_proto::agent::agent_server::Agent as Service;
use isopod_proto::agent::{
    AttachDiskRequest, AttachDiskResponse, AttachFileSystemRequest, AttachFileSystemResponse, ConfigurePodRequest,
    ConfigurePodResponse, CreateContainerRequest, CreateContainerResponse, DetachDiskRequest, DetachDiskResponse,
    ExecRequest, ExecResponse, InventoryRequest, InventoryResponse, MakeVolumeRequest, MakeVolumeResponse, MirrorPart,
    RemoveContainerRequest, RemoveContainerResponse, RemoveMirrorRequest, RemoveMirrorResponse, RemoveProcessRequest,
    RemoveProcessResponse, ResizeTerminalRequest, ResizeTerminalResponse, SetCpusRequest, SetCpusResponse,
    SetMirrorResponse, ShutdownRequest, ShutdownResponse, SignalRequest, SignalResponse, StartContainerRequest,
    StartContainerResponse, StatsRequest, StatsResponse, UpdateContainerRequest, UpdateContainerResponse,
    UpdatePodRequest, UpdatePodResponse, WaitProcessRequest, WaitProcessResponse,
};
use isopod_proto::{ErrorKind, MAX_MIRROR_MESSAGE};
use tokio::sync::Notify;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::mirror::Update;

/// The service over one agent.
pub struct Rpc {
    agent: Arc<Agent>,
    /// Told when the guest is to go off.
    shutdown: Arc<Notify>,
}

impl Rpc {
    /// Serves `agent`; tells `shutdown` when that is asked for.
    pub fn new(agent: Arc<Agent>, shutdown: Arc<Notify>) -> Self {
        Self { agent, shutdown }
    }

    async fn run<T, F>(&self, work: impl FnOnce(Arc<Agent>) -> F) -> std::result::Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match tokio::spawn(work(Arc::clone(&self.agent))).await {
            Ok(Ok(answer)) => Ok(Response::new(answer)),
            Ok(Err(error)) => Err(status(&error)),
            Err(error) => Err(Status::internal(format!("a task of the agent failed: {error}"))),
        }
    }
}

/// The numbers of the kinds are those of gRPC.
fn status(error: &Error) -> Status {
    let code = i32::try_from(error.kind().code()).map_or(Code::Internal, Code::from_i32);
    Status::new(code, error.chain())
}

type Answer<T> = std::result::Result<Response<T>, Status>;

#[tonic::async_trait]
impl Service for Rpc {
    async fn configure_pod(&self, request: Request<ConfigurePodRequest>) -> Answer<ConfigurePodResponse> {
        let request = request.into_inner();
        self.run(|agent| async move { agent.configure_pod(&request).await.map(|()| ConfigurePodResponse {}) }).await
    }

    async fn attach_disk(&self, request: Request<AttachDiskRequest>) -> Answer<AttachDiskResponse> {
        let AttachDiskRequest { id, image } = request.into_inner();
        self.run(|agent| async move { agent.attach_disk(&id, image).await.map(|()| AttachDiskResponse {}) }).await
    }

    async fn detach_disk(&self, request: Request<DetachDiskRequest>) -> Answer<DetachDiskResponse> {
        let DetachDiskRequest { id } = request.into_inner();
        self.run(|agent| async move { agent.detach_disk(&id).await.map(|()| DetachDiskResponse {}) }).await
    }

    async fn attach_file_system(&self, request: Request<AttachFileSystemRequest>) -> Answer<AttachFileSystemResponse> {
        let AttachFileSystemRequest { tag } = request.into_inner();
        self.run(|agent| async move { agent.attach_file_system(&tag).await.map(|()| AttachFileSystemResponse {}) })
            .await
    }

    async fn create_container(&self, request: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        let request = request.into_inner();
        self.run(|agent| async move {
            let user = agent.create_container(request).await?;
            Ok(CreateContainerResponse { user: Some(user) })
        })
        .await
    }

    async fn start_container(&self, request: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        let StartContainerRequest { id } = request.into_inner();
        self.run(|agent| async move { agent.start_container(&id).await.map(|()| StartContainerResponse {}) }).await
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        let request = request.into_inner();
        self.run(|agent| async move { agent.exec(request).await.map(|()| ExecResponse {}) }).await
    }

    async fn signal(&self, request: Request<SignalRequest>) -> Answer<SignalResponse> {
        let request = request.into_inner();
        self.run(|agent| async move { agent.signal(&request).map(|()| SignalResponse {}) }).await
    }

    async fn wait_process(&self, request: Request<WaitProcessRequest>) -> Answer<WaitProcessResponse> {
        let WaitProcessRequest { process_id } = request.into_inner();
        // Not in a task of its own: a client that does not wait any more ends the waiting.
        let outcome = self.agent.wait_process(&process_id).await.map_err(|error| status(&error))?;
        Ok(Response::new(WaitProcessResponse {
            exit_code: outcome.exit.code,
            signal: outcome.exit.signal,
            oom_killed: outcome.oom_killed,
            finished_at_nanos: outcome.exit.finished_at_nanos,
        }))
    }

    async fn remove_container(&self, request: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        let RemoveContainerRequest { id } = request.into_inner();
        self.run(|agent| async move { agent.remove_container(&id).await.map(|()| RemoveContainerResponse {}) }).await
    }

    async fn remove_process(&self, request: Request<RemoveProcessRequest>) -> Answer<RemoveProcessResponse> {
        let RemoveProcessRequest { process_id } = request.into_inner();
        self.run(|agent| async move { agent.remove_process(&process_id).map(|()| RemoveProcessResponse {}) }).await
    }

    async fn resize_terminal(&self, request: Request<ResizeTerminalRequest>) -> Answer<ResizeTerminalResponse> {
        let ResizeTerminalRequest { process_id, columns, rows } = request.into_inner();
        self.run(|agent| async move {
            agent.process(&process_id)?.resize(columns, rows)?;
            Ok(ResizeTerminalResponse {})
        })
        .await
    }

    async fn update_container(&self, request: Request<UpdateContainerRequest>) -> Answer<UpdateContainerResponse> {
        let request = request.into_inner();
        self.run(|agent| async move { agent.update_container(&request).await.map(|()| UpdateContainerResponse {}) })
            .await
    }

    async fn update_pod(&self, request: Request<UpdatePodRequest>) -> Answer<UpdatePodResponse> {
        let request = request.into_inner();
        self.run(|agent| async move { agent.update_pod(&request).await.map(|()| UpdatePodResponse {}) }).await
    }

    async fn set_cpus(&self, request: Request<SetCpusRequest>) -> Answer<SetCpusResponse> {
        let SetCpusRequest { count } = request.into_inner();
        self.run(|agent| async move { agent.set_cpus(count).await.map(|()| SetCpusResponse {}) }).await
    }

    async fn set_mirror(&self, request: Request<Streaming<MirrorPart>>) -> Answer<SetMirrorResponse> {
        let mut parts = request.into_inner();
        let MirrorPart { name, create, mut content, read_at_nanos: read_at } =
            parts.message().await?.unwrap_or_default();
        while let Some(part) = parts.message().await? {
            content.extend_from_slice(&part.content);
            if content.len() > MAX_MIRROR_MESSAGE {
                let text = format!("the mirror {name:?} takes more than {MAX_MIRROR_MESSAGE} bytes");
                return Err(status(&Error::new(ErrorKind::ResourceExhausted, text)));
            }
        }
        self.run(|agent| async move {
            agent.set_mirror(Update { name, create, read_at, content }).await.map(|()| SetMirrorResponse {})
        })
        .await
    }

    async fn make_volume(&self, request: Request<MakeVolumeRequest>) -> Answer<MakeVolumeResponse> {
        let request = request.into_inner();
        self.run(|agent| async move { agent.make_volume(request).await.map(|()| MakeVolumeResponse {}) }).await
    }

    async fn remove_mirror(&self, request: Request<RemoveMirrorRequest>) -> Answer<RemoveMirrorResponse> {
        let RemoveMirrorRequest { name } = request.into_inner();
        self.run(|agent| async move { agent.remove_mirror(name).await.map(|()| RemoveMirrorResponse {}) }).await
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Answer<StatsResponse> {
        let request = request.into_inner();
        self.run(|agent| async move { agent.stats(&request).await }).await
    }

    async fn inventory(&self, _: Request<InventoryRequest>) -> Answer<InventoryResponse> {
        self.run(|agent| async move { Ok(agent.inventory().await) }).await
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        self.shutdown.notify_one();
        Ok(Response::new(ShutdownResponse {}))
    }
}
