//! The agent's calls.

use isopod_proto::agent::agent_server::Agent;
use isopod_proto::agent::{
    AttachDiskRequest, AttachDiskResponse, AttachFileSystemRequest, AttachFileSystemResponse, BlockDeviceStats,
    CgroupStats, ConfigurePodRequest, ConfigurePodResponse, ContainerStats, CreateContainerRequest,
    CreateContainerResponse, DetachDiskRequest, DetachDiskResponse, ExecRequest, ExecResponse, InterfaceStats,
    InventoryRequest, InventoryResponse, MakeVolumeRequest, MakeVolumeResponse, MirrorPart, RemoveContainerRequest,
    RemoveContainerResponse, RemoveMirrorRequest, RemoveMirrorResponse, RemoveProcessRequest, RemoveProcessResponse,
    ResizeTerminalRequest, ResizeTerminalResponse, ResolvedUser, SetCpusRequest, SetCpusResponse, SetMirrorResponse,
    ShutdownRequest, ShutdownResponse, SignalRequest, SignalResponse, StartContainerRequest, StartContainerResponse,
    StatsRequest, StatsResponse, UpdateContainerRequest, UpdateContainerResponse, UpdatePodRequest, UpdatePodResponse,
    WaitProcessRequest, WaitProcessResponse,
};
use isopod_tests::hostile::Behaviour;
use tonic::{Code, Request, Response, Status, Streaming};

/// The agent.
pub struct Fake {
    behaviour: Behaviour,
}

impl Fake {
    /// One that behaves so.
    pub fn new(behaviour: Behaviour) -> Self {
        Self { behaviour }
    }

    /// What to say to a call that it takes to make a pod.
    async fn ready<T: Default>(&self) -> Result<Response<T>, Status> {
        match self.behaviour {
            Behaviour::Mute => std::future::pending().await,
            _ => Ok(Response::new(T::default())),
        }
    }

    /// What to say to a call that it takes to start a container.
    async fn started<T: Default>(&self) -> Result<Response<T>, Status> {
        match self.behaviour {
            Behaviour::Idle => std::future::pending().await,
            _ => Ok(Response::new(T::default())),
        }
    }

    /// What to say to another call that is only done or not.
    async fn done<T: Default>(&self) -> Result<Response<T>, Status> {
        match self.behaviour {
            Behaviour::Silent | Behaviour::Idle => std::future::pending().await,
            // A code that does not exist, and a message that is no text.
            Behaviour::Lying => Err(Status::new(Code::from_i32(9999), "\0\x1b[2J../../".repeat(100))),
            _ => Ok(Response::new(T::default())),
        }
    }

    async fn create(&self) -> Result<Response<CreateContainerResponse>, Status> {
        let groups = match self.behaviour {
            // As many as a message holds.
            Behaviour::Bloated => vec![u32::MAX; 700_000],
            Behaviour::Idle => return std::future::pending().await,
            _ => vec![],
        };
        let user = ResolvedUser { uid: u32::MAX, gid: u32::MAX, supplemental_groups: groups };
        Ok(Response::new(CreateContainerResponse { user: Some(user) }))
    }

    async fn wait(&self) -> Result<Response<WaitProcessResponse>, Status> {
        match self.behaviour {
            Behaviour::Lying => {
                // Long enough that it is seen to run.
                tokio::time::sleep(std::time::Duration::from_secs(2)).await;
                Ok(Response::new(WaitProcessResponse {
                    exit_code: -1_000_000,
                    signal: u32::MAX,
                    oom_killed: true,
                    finished_at_nanos: i64::MAX,
                }))
            }
            Behaviour::Closing => Err(Status::unavailable("not now")),
            _ => std::future::pending().await,
        }
    }

    async fn counters(&self) -> Result<Response<StatsResponse>, Status> {
        let name = "../../../etc/passwd\0\n".repeat(20);
        let device = BlockDeviceStats { name: name.clone(), major: u32::MAX, ..Default::default() };
        let cgroup = CgroupStats {
            cpu_usage_micros: Some(u64::MAX),
            memory_usage_bytes: Some(u64::MAX),
            memory_limit_bytes: Some(i64::MIN),
            devices: vec![device; 1000],
            ..Default::default()
        };
        let interface = InterfaceStats { name: name.clone(), rx_bytes: u64::MAX, ..Default::default() };
        let container =
            ContainerStats { id: name, timestamp_nanos: i64::MIN, cgroup: Some(cgroup.clone()), ..Default::default() };
        match self.behaviour {
            Behaviour::Silent | Behaviour::Idle => std::future::pending().await,
            Behaviour::Flooding => {
                Ok(Response::new(StatsResponse { interfaces: vec![interface; 100_000], ..Default::default() }))
            }
            _ => Ok(Response::new(StatsResponse {
                containers: vec![container; 2],
                interfaces: vec![interface; 2000],
                memory_total_bytes: u64::MAX,
                timestamp_nanos: i64::MAX,
                pod: Some(cgroup),
                ..Default::default()
            })),
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Agent for Fake {
    async fn configure_pod(&self, _: Request<ConfigurePodRequest>) -> Answer<ConfigurePodResponse> {
        self.ready().await
    }
    async fn attach_disk(&self, _: Request<AttachDiskRequest>) -> Answer<AttachDiskResponse> {
        self.started().await
    }
    async fn detach_disk(&self, _: Request<DetachDiskRequest>) -> Answer<DetachDiskResponse> {
        self.done().await
    }
    async fn create_container(&self, _: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        self.create().await
    }
    async fn start_container(&self, _: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        self.started().await
    }
    async fn exec(&self, _: Request<ExecRequest>) -> Answer<ExecResponse> {
        self.done().await
    }
    async fn signal(&self, _: Request<SignalRequest>) -> Answer<SignalResponse> {
        self.done().await
    }
    async fn wait_process(&self, _: Request<WaitProcessRequest>) -> Answer<WaitProcessResponse> {
        self.wait().await
    }
    async fn remove_container(&self, _: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        self.done().await
    }
    async fn remove_process(&self, _: Request<RemoveProcessRequest>) -> Answer<RemoveProcessResponse> {
        self.done().await
    }
    async fn resize_terminal(&self, _: Request<ResizeTerminalRequest>) -> Answer<ResizeTerminalResponse> {
        self.done().await
    }
    async fn update_container(&self, _: Request<UpdateContainerRequest>) -> Answer<UpdateContainerResponse> {
        self.done().await
    }
    async fn update_pod(&self, _: Request<UpdatePodRequest>) -> Answer<UpdatePodResponse> {
        self.done().await
    }
    async fn set_cpus(&self, _: Request<SetCpusRequest>) -> Answer<SetCpusResponse> {
        self.done().await
    }
    async fn attach_file_system(&self, _: Request<AttachFileSystemRequest>) -> Answer<AttachFileSystemResponse> {
        self.done().await
    }
    async fn set_mirror(&self, _: Request<Streaming<MirrorPart>>) -> Answer<SetMirrorResponse> {
        self.done().await
    }
    async fn remove_mirror(&self, _: Request<RemoveMirrorRequest>) -> Answer<RemoveMirrorResponse> {
        self.done().await
    }
    async fn make_volume(&self, _: Request<MakeVolumeRequest>) -> Answer<MakeVolumeResponse> {
        self.done().await
    }
    async fn stats(&self, _: Request<StatsRequest>) -> Answer<StatsResponse> {
        self.counters().await
    }
    async fn inventory(&self, _: Request<InventoryRequest>) -> Answer<InventoryResponse> {
        self.done().await
    }
    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        self.done().await
    }
}
