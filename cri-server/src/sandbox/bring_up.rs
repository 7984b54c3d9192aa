//! From a reserved name to a guest that is the pod it is to be.
//!
//! Each step enters what it took into the sandbox's record before the next one begins, so whatever fails, and whenever the
//! daemon ends, [`super::resources::release`] finds all of it.

use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ErrorKind;
use isopod_proto::agent::{ConfigurePodRequest, Hello, Interface, Route};
use tokio::time::timeout;

use super::size::Size;
use super::users::NoUser;
use super::{SandboxRecord, files, now, resources, scratch, size};
use crate::cgroup::{self, CgroupError};
use crate::check;
use crate::context::Context;
use crate::guest::{Guest, GuestError, HelloConnection, LONG};
use crate::network::pod::{PodNetwork, PodRoute};
use crate::network::{Attachment, NetworkError};
use crate::store::StateError;
use crate::vmm::{self, BootDisk, VSOCK_SOCKET, Vm, VmSpec, VmmError, console_tail};
use crate::{container, cri};

/// The scratch disk's id in the VM.
pub(super) const SCRATCH_DISK: &str = "scratch";
/// The agent's call that makes a guest a pod.
const CONFIGURE: &str = "ConfigurePod";
/// The name of a pod's interface, as everywhere in Kubernetes.
const INTERFACE: &str = "eth0";
/// How long the reason of a lost connection is waited for.
const END_GRACE: Duration = Duration::from_secs(3);

/// A sandbox's running VM and the way into its guest.
#[derive(Clone)]
pub struct Up {
    /// The VMM process.
    pub vm: Arc<Vm>,
    /// The guest.
    pub guest: Guest,
}

/// A sandbox that cannot be brought up.
#[derive(Debug, thiserror::Error)]
pub enum BringUpError {
    /// Its directory.
    #[error("cannot make the sandbox's directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file of the guest's.
    #[error("cannot open {path}")]
    GuestFile {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The host cannot run a Linux guest, or there is no kernel to run.
    #[error("{problem}")]
    Host {
        /// What is wrong.
        problem: String,
    },
    /// The scratch disk.
    #[error("no scratch disk")]
    Scratch(#[source] crate::ext4::Ext4Error),
    /// The cgroup.
    #[error("no cgroup")]
    Cgroup(#[source] CgroupError),
    /// The user its VMM would be.
    #[error("no user for the VMM")]
    User(#[source] NoUser),
    /// The network.
    #[error("no network")]
    Network(#[source] NetworkError),
    /// The VMM.
    #[error("no VM")]
    Vmm(#[source] VmmError),
    /// The guest.
    #[error("no contact with the guest")]
    Guest(#[source] GuestError),
    /// The guest does not become the pod it is to be.
    #[error("the guest cannot be made the pod")]
    Configure(#[source] GuestError),
    /// The agent does not report.
    #[error("the agent said no hello within {} s; console:\n{console}", deadline.as_secs())]
    NoHello {
        /// What it had.
        deadline: Duration,
        /// The end of the guest's console.
        console: String,
    },
    /// The database.
    #[error("cannot keep the state")]
    State(#[source] StateError),
    /// A thread died.
    #[error("a thread of the daemon panicked")]
    Panicked,
}

impl BringUpError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Directory { .. } | Self::GuestFile { .. } | Self::Panicked => ErrorKind::Internal,
            Self::Host { .. } => ErrorKind::FailedPrecondition,
            Self::Scratch(error) => error.kind(),
            Self::Cgroup(error) => error.kind(),
            Self::User(error) => error.kind(),
            Self::Network(error) => error.kind(),
            Self::Vmm(error) => error.kind(),
            Self::Guest(error) | Self::Configure(error) => error.kind(),
            Self::NoHello { .. } => ErrorKind::DeadlineExceeded,
            Self::State(error) => error.kind(),
        }
    }
}

/// Brings the sandbox up. After an error the caller releases what `record` names.
pub async fn bring_up(context: &Context, record: &mut SandboxRecord) -> Result<Up, BringUpError> {
    let config = &context.config;
    let host = |problem| BringUpError::Host { problem };
    // A KVM without hardware behind it makes VMs whose kernel never comes up: not worth waiting for.
    check::check_cpu().map_err(host)?;
    check::check_kernel(&config.vmm.kernel).map_err(host)?;
    let pod = record.config.linux.clone();
    let parent = pod.as_ref().map(|pod| pod.cgroup_parent.clone()).unwrap_or_default();

    let directory = resources::directory(context, &record.id);
    make_directory(&directory)?;
    let cgroup = cgroup::directory(config.cgroup_driver, &parent, &record.id).map_err(BringUpError::Cgroup)?;
    // Before it is made, so that a later daemon finds it whenever this one ends.
    record.cgroup = Some(cgroup.clone());
    let uid = context.users.claim(&record.id).map_err(BringUpError::User)?;
    record.uid = Some(uid);
    context.store.put_sandbox(record).await.map_err(BringUpError::State)?;
    let scratch = make_scratch(context, record).await?;
    let attachment = context.network.attach(&record.id, &record.config).await.map_err(BringUpError::Network)?;
    record.network = Some(attachment.network.clone());
    context.store.put_sandbox(record).await.map_err(BringUpError::State)?;

    let network = attachment.network.clone();
    let (vm, configuration, hello) = start_vm(context, record, uid, scratch, attachment).await?;
    // It waits for its configuration, so it uses no memory before it is in its cgroup.
    cgroup::make(&cgroup, vm.identity().pid).await.map_err(BringUpError::Cgroup)?;
    context.store.put_sandbox(record).await.map_err(BringUpError::State)?;
    configuration.deliver(&vm).await.map_err(BringUpError::Vmm)?;
    let hello = await_hello(&vm, hello, config.vmm.boot_deadline).await?;
    tracing::info!(
        kernel = hello.kernel_release,
        agent = hello.agent_version,
        uptime_millis = hello.uptime_nanos / 1_000_000,
        "the guest is up"
    );
    let guest = Guest::new(directory.join(VSOCK_SOCKET));
    if let Err(error) = configure(record, &guest, &network).await {
        return Err(BringUpError::Configure(error.or_end_of(&vm, CONFIGURE).await));
    }
    Ok(Up { vm: Arc::new(vm), guest })
}

fn make_directory(path: &Path) -> Result<(), BringUpError> {
    let failed = |source| BringUpError::Directory { path: path.into(), source };
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    DirBuilder::new().mode(0o700).create(path).map_err(failed)
}

async fn make_scratch(context: &Context, record: &SandboxRecord) -> Result<BootDisk, BringUpError> {
    let (root, id, length) = (context.config.root.clone(), record.id.clone(), context.config.vmm.scratch_bytes);
    let made = tokio::task::spawn_blocking(move || scratch::make(&root, &id, length)).await;
    let file = made.map_err(|_| BringUpError::Panicked)?.map_err(BringUpError::Scratch)?;
    Ok(BootDisk { id: SCRATCH_DISK, file, length })
}

async fn start_vm(
    context: &Context,
    record: &mut SandboxRecord,
    uid: u32,
    scratch: BootDisk,
    attachment: Attachment,
) -> Result<(Vm, vmm::Configuration, HelloConnection), BringUpError> {
    let config = &context.config.vmm;
    let directory = &resources::directory(context, &record.id);
    let open = |path: &Path| File::open(path).map_err(|source| BringUpError::GuestFile { path: path.into(), source });
    let host = Size::of_host(config);
    let size = size::of(record.config.linux.as_ref(), config, host);
    let largest = size::largest(size, config, host);
    record.size = Some(size);
    let spec = VmSpec {
        binary: config.binary.clone(),
        directory: directory.into(),
        uid,
        vcpus: size.vcpus,
        memory_bytes: size.memory_bytes,
        max_vcpus: largest.vcpus,
        max_memory_bytes: largest.memory_bytes,
        kernel: open(&config.kernel)?,
        initramfs: open(&config.initramfs)?,
        disks: vec![scratch],
        interface: (attachment.tap, attachment.network.mac.0, attachment.network.mtu),
        verbose_console: config.verbose_console,
    };
    let sockets = Vm::listen(directory).map_err(BringUpError::Vmm)?;
    // Before the VMM runs, so that the hello cannot come too early.
    let hello = HelloConnection::open(&directory.join(VSOCK_SOCKET)).await.map_err(BringUpError::Guest)?;
    let (vm, configuration) = Vm::spawn(spec, sockets).map_err(BringUpError::Vmm)?;
    record.vm = Some(vm.identity());
    Ok((vm, configuration, hello))
}

/// Waits for the agent's hello, as long as the VM lives and the deadline allows.
async fn await_hello(vm: &Vm, hello: HelloConnection, deadline: Duration) -> Result<Hello, BringUpError> {
    let ended = |end: Arc<vmm::VmEnd>| {
        BringUpError::Vmm(VmmError::Ended { message: end.message.clone(), console: end.console.clone() })
    };
    let received = tokio::select! {
        received = timeout(deadline, hello.receive()) => received,
        end = vm.ended() => return Err(ended(end)),
    };
    match received {
        Ok(Ok(hello)) => Ok(hello),
        // If the VM is about to end, its end says more than the connection that it closed.
        Ok(Err(error)) => match timeout(END_GRACE, vm.ended()).await {
            Ok(end) => Err(ended(end)),
            Err(_) => Err(BringUpError::Guest(error)),
        },
        Err(_) => {
            let console = match vmm::console(vm.directory()).await {
                Ok(bytes) => console_tail(&bytes, 30),
                Err(error) => format!("({error})"),
            };
            Err(BringUpError::NoHello { deadline, console })
        }
    }
}

async fn configure(record: &SandboxRecord, guest: &Guest, network: &PodNetwork) -> Result<(), GuestError> {
    let hostname = record.hostname();
    // A node without the file has no resolver to offer.
    let of_node = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let request = ConfigurePodRequest {
        interfaces: vec![Interface {
            mac: network.mac.to_string(),
            name: INTERFACE.to_owned(),
            addresses: network.addresses.iter().map(ToString::to_string).collect(),
            mtu: network.mtu,
        }],
        routes: network.routes.iter().map(route).collect(),
        resolv_conf: files::resolv_conf(record.config.dns_config.as_ref(), network.dns.as_ref(), &of_node).into(),
        hosts: files::hosts(&hostname, network.ips()).into(),
        hostname,
        sysctls: sysctls(&record.config),
        scratch_disk: SCRATCH_DISK.to_owned(),
        realtime_nanos: now(),
        shm_size_bytes: 0,
    };
    let mut client = guest.client();
    Guest::call(CONFIGURE, LONG, client.configure_pod(request)).await.map(drop)
}

/// What the pod asks for. The network of a guest belongs to no user namespace but the guest's own, so that a pod that has
/// another one has no CAP_NET_BIND_SERVICE there; it may use low ports all the same, as it may with other runtimes.
fn sysctls(config: &cri::PodSandboxConfig) -> HashMap<String, String> {
    const LOW_PORTS: &str = "net.ipv4.ip_unprivileged_port_start";
    let linux = config.linux.clone().unwrap_or_default();
    let options = linux.security_context.and_then(|context| context.namespace_options);
    let mut sysctls = linux.sysctls;
    if matches!(container::user_namespace_of_options(options.as_ref()), Ok(Some(_))) {
        sysctls.entry(LOW_PORTS.to_owned()).or_insert_with(|| "0".to_owned());
    }
    sysctls
}

fn route(route: &PodRoute) -> Route {
    Route {
        destination: route.destination.to_string(),
        gateway: route.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        interface: INTERFACE.to_owned(),
    }
}
