//! Everything the agent knows of its pod, and what the daemon can ask of it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use isopod_proto::agent::{
    ConfigurePodRequest, CreateContainerRequest, ExecRequest, InventoryResponse, MakeVolumeRequest, PidMode,
    ResolvedUser, SignalRequest, StatsRequest, StatsResponse, UpdateContainerRequest, UpdatePodRequest, Verity,
    make_volume_request, mount,
};
use isopod_proto::{ErrorKind, ObjectId};
use parking_lot::Mutex;
use tokio::time::sleep;

use crate::cgroup::Cgroup;
use crate::container::{self, Container, Parts};
use crate::disk::{DiskSource, Disks};
use crate::error::{Context as _, Error, Result};
use crate::layout::Layout;
use crate::mirror::{self, Mirrors};
use crate::pod_init::PodInit;
use crate::process::{Outcome, Process};
use crate::reaper::Reaper;
use crate::user_namespace::UserNamespaces;
use crate::volume::{self, Storage, Volumes};
use crate::{cgroup, cpus, devices, pod, shares, stats, sys};

/// A thing with an id: there, or under way to be or to go. Under way is what a second request for the same id meets.
enum Slot<T> {
    Reserved,
    Present(Arc<T>),
}

type Table<T> = Mutex<HashMap<String, Slot<T>>>;

/// How long an inventory waits for requests that are at work: a container takes less to be made or started.
const SETTLE: Duration = Duration::from_secs(10);
const SETTLE_PAUSE: Duration = Duration::from_millis(10);

/// The state of the agent. No lock of it is held while something is started, mounted or waited for.
pub struct Agent {
    /// Where things are.
    pub layout: Layout,
    reaper: Arc<Reaper>,
    disks: Disks,
    pod_init: PodInit,
    user_namespaces: UserNamespaces,
    mirrors: Arc<Mirrors>,
    volumes: Arc<Volumes>,
    configured: Mutex<Configured>,
    containers: Table<Container>,
    processes: Table<Process>,
    /// CPU time of the whole pod.
    cpu_rate: Arc<stats::CpuRate>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Configured {
    No,
    Now,
    Yes,
}

impl Agent {
    /// An agent without a pod yet.
    pub fn new(layout: Layout, disks: DiskSource, reaper: Arc<Reaper>) -> Arc<Self> {
        let pod_init = PodInit::new(Arc::clone(&reaper), layout.clone());
        let user_namespaces = UserNamespaces::new(Arc::clone(&reaper), layout.clone());
        Arc::new(Self {
            disks: Disks::new(layout.clone(), disks),
            mirrors: Arc::new(Mirrors::new(layout.clone())),
            volumes: Arc::new(Volumes::new(layout.clone())),
            layout,
            reaper,
            pod_init,
            user_namespaces,
            configured: Mutex::new(Configured::No),
            containers: Mutex::default(),
            processes: Mutex::default(),
            cpu_rate: Arc::default(),
        })
    }

    /// Makes the guest the pod it is to be. Once.
    pub async fn configure_pod(&self, request: &ConfigurePodRequest) -> Result<()> {
        {
            let mut configured = self.configured.lock();
            if *configured != Configured::No {
                return Err(Error::precondition("the pod is configured already"));
            }
            *configured = Configured::Now;
        }
        let result = pod::configure(&self.layout, &self.disks, request).await;
        *self.configured.lock() = if result.is_ok() { Configured::Yes } else { Configured::No };
        result
    }

    /// Waits for a disk, and mounts it if it is an image.
    pub async fn attach_disk(&self, id: &str, image: Option<Verity>) -> Result<()> {
        self.disks.attach(id, image).await
    }

    /// Unmounts a disk and removes its PCI function.
    pub async fn detach_disk(&self, id: &str) -> Result<()> {
        self.disks.detach(id).await
    }

    /// Mounts what the host shares with the pod.
    pub async fn attach_file_system(&self, tag: &str) -> Result<()> {
        let (layout, tag) = (self.layout.clone(), tag.to_owned());
        blocking(move || shares::attach(&layout, &tag)).await
    }

    /// Makes a mirror show what the update says.
    pub async fn set_mirror(&self, update: mirror::Update) -> Result<()> {
        let mirrors = Arc::clone(&self.mirrors);
        blocking(move || mirrors.set(&update)).await
    }

    /// Makes a volume of the pod, unless it is there.
    pub async fn make_volume(&self, request: MakeVolumeRequest) -> Result<()> {
        let MakeVolumeRequest { name, storage, mode, uid, gid } = request;
        let storage = match storage {
            Some(make_volume_request::Storage::Disk(disk)) => {
                Storage::Disk(format!("/dev/{}", self.disks.device(&disk)?))
            }
            Some(make_volume_request::Storage::TmpfsSizeBytes(bytes)) => Storage::Memory(bytes),
            None => return Err(Error::invalid(format!("the volume {name:?} has no storage"))),
        };
        let volumes = Arc::clone(&self.volumes);
        blocking(move || volumes.make(&volume::Wanted { name, storage, mode, owner: (uid, gid) })).await
    }

    /// Removes a mirror. An unknown one is removed already.
    pub async fn remove_mirror(&self, name: String) -> Result<()> {
        let mirrors = Arc::clone(&self.mirrors);
        blocking(move || mirrors.remove(&name)).await
    }

    /// Makes a container; its process waits for [`Agent::start_container`].
    pub async fn create_container(&self, request: CreateContainerRequest) -> Result<ResolvedUser> {
        let id = checked_id(&request.id)?;
        if *self.configured.lock() != Configured::Yes {
            return Err(Error::precondition("the pod is not configured"));
        }
        let reservation = Reservation::new(&self.containers, "container", &id)?;
        let process = Reservation::new(&self.processes, "process", &id)?;
        let parts = Parts {
            layout: self.layout.clone(),
            reaper: Arc::clone(&self.reaper),
            image: self.disks.image(&request.image_disk)?,
            image_volumes: self.image_volumes(&request)?,
            volumes: Arc::clone(&self.volumes),
            devices: self.devices(&request)?,
            pid_namespace: self.pid_namespace(&request).await?,
            user_namespace: match &request.user_namespace {
                Some(wanted) => Some(self.user_namespaces.get(wanted).await?),
                None => None,
            },
        };
        let (container, user) = blocking(move || container::create(&parts, &request)).await?;
        process.fill(Arc::clone(&container.init));
        reservation.fill(container);
        Ok(user)
    }

    /// Where the images that are volumes of the container are mounted, by their disks.
    fn image_volumes(&self, request: &CreateContainerRequest) -> Result<HashMap<String, PathBuf>> {
        let images = request.mounts.iter().filter_map(|mount| match &mount.source {
            Some(mount::Source::Image(image)) => Some(&image.disk),
            _ => None,
        });
        images.map(|disk| Ok((disk.clone(), self.disks.image(disk)?))).collect()
    }

    /// The device nodes that the container asks for.
    fn devices(&self, request: &CreateContainerRequest) -> Result<Vec<crate::stub::message::Device>> {
        request.devices.iter().map(|device| devices::resolve(device, &self.disks)).collect()
    }

    /// A process in the PID namespace that the container is to join, if it joins one.
    async fn pid_namespace(&self, request: &CreateContainerRequest) -> Result<Option<OwnedFd>> {
        match request.pid_mode() {
            PidMode::Container | PidMode::Node => Ok(None),
            PidMode::Pod => self.pod_init.pidfd().await.map(Some),
            PidMode::Target => {
                let target = self.container(&request.pid_target)?;
                let pidfd = target.init.pidfd()?;
                pidfd.try_clone().context(|| "duplicate a pidfd").map(Some)
            }
        }
    }

    /// Starts the process of a created container.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        blocking(move || container.start()).await
    }

    /// Starts a further process in a running container.
    pub async fn exec(&self, request: ExecRequest) -> Result<()> {
        let id = checked_id(&request.process_id)?;
        let container = self.container(&request.container_id)?;
        let reservation = Reservation::new(&self.processes, "process", &id)?;
        let reaper = Arc::clone(&self.reaper);
        let process = blocking(move || container.exec(&reaper, &request)).await?;
        reservation.fill(process);
        Ok(())
    }

    /// Sends a signal to a process, or to all of its cgroup.
    pub fn signal(&self, request: &SignalRequest) -> Result<()> {
        let SignalRequest { process_id, signal, all } = request;
        let number = i32::try_from(*signal).ok().filter(|number| (1..=64).contains(number));
        let number = number.ok_or_else(|| Error::invalid(format!("{signal} is not the number of a signal")))?;
        let process = self.process(process_id)?;
        if !all {
            return process.signal(number);
        }
        if number == libc::SIGKILL {
            process.cgroup.kill();
            return Ok(());
        }
        for pid in process.cgroup.processes() {
            // A process may have ended since the list was read. Its id is not used again before the reaper has run, and
            // for an orphan of another parent in the container the worst is a signal to a newer process of the same guest.
            let _ = sys::kill(pid, number);
        }
        Ok(())
    }

    /// Waits for the end of a process and of its output.
    pub async fn wait_process(&self, id: &str) -> Result<Outcome> {
        let process = self.process(id)?;
        process.finished().await
    }

    /// Removes a container with all that belongs to it. An unknown one is removed already.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let id = checked_id(id)?;
        let container = {
            let mut containers = self.containers.lock();
            match containers.get_mut(&id) {
                None => return Ok(()),
                Some(slot) => match std::mem::replace(slot, Slot::Reserved) {
                    Slot::Present(container) => container,
                    Slot::Reserved => return Err(busy("container", &id)),
                },
            }
        };
        container.init.kill();
        container.cgroup.kill();
        let (layout, name) = (self.layout.clone(), id.clone());
        let result = blocking(move || {
            container.cgroup.remove()?;
            drop(container);
            container::release(&layout, &name)
        })
        .await;
        let gone = self.take_processes_of(&id);
        gone.iter().for_each(|process| process.abandon_output());
        // What is left after a failure is in the guest's own file system and goes with it; the container is gone for all.
        self.containers.lock().remove(&id);
        result
    }

    fn take_processes_of(&self, container: &str) -> Vec<Arc<Process>> {
        let mut gone = Vec::new();
        self.processes.lock().retain(|_, slot| match slot {
            Slot::Present(process) if process.container_id == container => {
                gone.push(Arc::clone(process));
                false
            }
            _ => true,
        });
        gone
    }

    /// Forgets an ended exec process. An unknown one is forgotten already.
    pub fn remove_process(&self, id: &str) -> Result<()> {
        let id = checked_id(id)?;
        let mut processes = self.processes.lock();
        let process = match processes.get(&id) {
            None => return Ok(()),
            Some(Slot::Reserved) => return Err(busy("process", &id)),
            Some(Slot::Present(process)) => Arc::clone(process),
        };
        if process.container_id == id {
            return Err(Error::precondition(format!("process {id} is the first of its container and goes with it")));
        }
        if !process.has_ended() {
            return Err(Error::precondition(format!("process {id} still runs")));
        }
        processes.remove(&id);
        process.cgroup.remove_if_empty();
        process.abandon_output();
        Ok(())
    }

    /// Changes the limits of a container.
    pub async fn update_container(&self, request: &UpdateContainerRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        let settings = cgroup::settings(&request.resources.clone().unwrap_or_default())?;
        blocking(move || container.cgroup.update(&settings)).await
    }

    /// Changes the limits of all containers together.
    pub async fn update_pod(&self, request: &UpdatePodRequest) -> Result<()> {
        let settings = cgroup::settings(&request.resources.clone().unwrap_or_default())?;
        let path = self.layout.cgroup_parent().to_owned();
        blocking(move || Cgroup::open(path)?.update(&settings)).await
    }

    /// Brings up so many processors, and takes the others down.
    pub async fn set_cpus(&self, count: u32) -> Result<()> {
        blocking(move || cpus::set(Path::new(cpus::DIRECTORY), count)).await
    }

    /// Counters of the guest and of the named containers, or of all.
    pub async fn stats(&self, request: &StatsRequest) -> Result<StatsResponse> {
        let containers: Vec<Arc<Container>> = if request.container_ids.is_empty() {
            present(&self.containers).0
        } else {
            request.container_ids.iter().map(|id| self.container(id)).collect::<Result<_>>()?
        };
        let (layout, rate, descriptors) = (self.layout.clone(), Arc::clone(&self.cpu_rate), request.descriptors);
        let wanted =
            move || stats::collect(&layout, &stats::Wanted { containers: &containers, descriptors, pod_rate: &rate });
        blocking(move || Ok(wanted())).await
    }

    /// What there is, once no request is at work on it any more, or [`SETTLE`] has passed.
    pub async fn inventory(&self) -> InventoryResponse {
        let deadline = Instant::now() + SETTLE;
        loop {
            let (containers, one_is_busy) = present(&self.containers);
            let (processes, another_is_busy) = present(&self.processes);
            let found: Vec<_> = containers.iter().filter_map(|container| container.present()).collect();
            let settled = !one_is_busy && !another_is_busy && found.len() == containers.len();
            if settled || Instant::now() >= deadline {
                let exec = |process: &Arc<Process>| (process.container_id != process.id).then(|| process.id.clone());
                return InventoryResponse {
                    containers: found,
                    exec_process_ids: processes.iter().filter_map(exec).collect(),
                };
            }
            sleep(SETTLE_PAUSE).await;
        }
    }

    /// Ends every container, for the guest's end.
    pub async fn kill_all(&self) {
        let (containers, _) = present(&self.containers);
        for container in &containers {
            container.init.kill();
            container.cgroup.kill();
        }
        for container in &containers {
            container.init.ended().await;
        }
    }

    /// The process with this id.
    pub fn process(&self, id: &str) -> Result<Arc<Process>> {
        find(&self.processes, "process", id)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        find(&self.containers, "container", id)
    }
}

/// A place in a table that is kept until the thing is there; dropped without it, the place is free again.
struct Reservation<'a, T> {
    table: &'a Table<T>,
    id: String,
    filled: bool,
}

impl<'a, T> Reservation<'a, T> {
    fn new(table: &'a Table<T>, what: &str, id: &str) -> Result<Self> {
        let mut slots = table.lock();
        match slots.get(id) {
            Some(Slot::Present(_)) => Err(Error::new(ErrorKind::AlreadyExists, format!("{what} {id} exists already"))),
            Some(Slot::Reserved) => Err(busy(what, id)),
            None => {
                slots.insert(id.to_owned(), Slot::Reserved);
                Ok(Self { table, id: id.to_owned(), filled: false })
            }
        }
    }

    fn fill(mut self, thing: Arc<T>) {
        self.table.lock().insert(self.id.clone(), Slot::Present(thing));
        self.filled = true;
    }
}

impl<T> Drop for Reservation<'_, T> {
    fn drop(&mut self) {
        if !self.filled {
            self.table.lock().remove(&self.id);
        }
    }
}

/// What is in a table, and whether something else is under way to be or to go.
fn present<T>(table: &Table<T>) -> (Vec<Arc<T>>, bool) {
    let slots = table.lock();
    let things: Vec<Arc<T>> = slots
        .values()
        .filter_map(|slot| if let Slot::Present(thing) = slot { Some(Arc::clone(thing)) } else { None })
        .collect();
    let busy = things.len() < slots.len();
    (things, busy)
}

fn find<T>(table: &Table<T>, what: &str, id: &str) -> Result<Arc<T>> {
    match table.lock().get(id) {
        Some(Slot::Present(thing)) => Ok(Arc::clone(thing)),
        Some(Slot::Reserved) => Err(busy(what, id)),
        None => Err(Error::not_found(format!("there is no {what} {:?}", id.chars().take(80).collect::<String>()))),
    }
}

fn busy(what: &str, id: &str) -> Error {
    Error::precondition(format!("another request for {what} {id} is under way"))
}

fn checked_id(id: &str) -> Result<String> {
    match ObjectId::parse(id) {
        Ok(id) => Ok(id.as_str().to_owned()),
        Err(error) => Err(Error::invalid(error.to_string())),
    }
}

/// Runs what blocks on a thread for that.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::new(ErrorKind::Internal, format!("a task of the agent failed: {error}"))),
    }
}
