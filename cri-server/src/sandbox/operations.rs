//! What a driver does to its containers.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use isopod_image_store::{DiskSegment, Image};
use isopod_proto::ObjectId;
use isopod_proto::agent::{
    self, AttachDiskRequest, DetachDiskRequest, RemoveContainerRequest, SignalRequest, StartContainerRequest, Verity,
    WaitProcessResponse,
};
use prost::Message;

use super::admission::{ContainerPhase, Request};
use super::attach;
use super::bring_up::Up;
use super::driver::{Container, Driver, Event, Reply};
use super::exec::{self, Outcome};
use super::{SandboxError, now, resources};
use crate::container::{self, ContainerRecord, ContainerState, Exit, SpecError, User, create_request, exec_process};
use crate::cri;
use crate::grpc::status::chain;
use crate::guest::{GuestError, LONG, SHORT};
use crate::streaming::requests::Wanted;
use crate::vmm::{self, DiskContents, DiskPart};
use crate::volume;

pub(super) const SIGKILL: u32 = 9;
/// Most groups a process can have in Linux (NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;
/// How long a killed container may take to end, with its log.
const KILL_DEADLINE: Duration = Duration::from_secs(60);

fn guest_failed(doing: &'static str) -> impl FnOnce(GuestError) -> SandboxError {
    move |source| SandboxError::Guest { doing, source }
}

fn not_found(id: &ObjectId) -> SandboxError {
    SandboxError::NotFound { what: "container", id: id.to_string() }
}

impl Driver {
    /// CreateContainer.
    pub(super) async fn create(&mut self, mut config: cri::ContainerConfig) -> Result<ObjectId, SandboxError> {
        self.admit(&self.record.id.clone(), Request::CreateContainer)?;
        container::check(&config).map_err(SandboxError::Spec)?;
        let metadata = config.metadata.clone().unwrap_or_default();
        let same = |container: &&mut Container| container.record.config.metadata.as_ref() == Some(&metadata);
        if let Some(container) = self.containers.values_mut().find(same) {
            let id = container.record.id.clone();
            if std::mem::replace(&mut container.delivered, true) {
                let name = format!("{}_{}", metadata.name, metadata.attempt);
                return Err(SandboxError::Reserved { what: "container", name, owner: id });
            }
            return Ok(id);
        }
        let log_path = log_path(&self.record.config.log_directory, &config.log_path).map_err(SandboxError::Spec)?;
        let image = self.image(&config).await?;
        let image_id = image.id.to_string();
        let id = crate::random_id().map_err(|_| SandboxError::Ended)?;
        let stop_signal = container::stop_signal(&config, &image.config.stop_signal).map_err(SandboxError::Spec)?;
        let target = self.pid_target(&config)?;
        let volumes = volume::plan::plan(&config.mounts).map_err(SandboxError::Spec)?;
        let devices = volume::device::plan(&config.devices).map_err(SandboxError::Spec)?;
        let mut request =
            create_request(&id, &config, (&image_id, &image.config), &self.record.hostname(), target.as_ref())
                .map_err(SandboxError::Spec)?;
        confine(&mut request, &config).await?;
        request.user_namespace = container::user_namespace(&self.record.config, &config).map_err(SandboxError::Spec)?;
        let process = request.process.as_ref().map(Message::encode_to_vec).unwrap_or_default();

        let limits = config.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
        if let Err(error) = self.apply_cpu_sets(Some((&id, &limits))).await {
            self.release_cpu_sets().await;
            return Err(error);
        }
        if let Err(error) = self.attach(&image).await {
            self.undo_create(&id).await;
            return Err(error);
        }
        let prepared = match self.prepare_volumes(&id, volumes, devices).await {
            Ok(prepared) => prepared,
            Err(error) => {
                self.undo_create(&id).await;
                return Err(error);
            }
        };
        request.mounts.extend(prepared.mounts);
        request.devices.extend(prepared.devices);
        for (mount, image) in &prepared.images {
            name_image(&mut config.mounts[*mount], image);
        }
        let mut client = self.up()?.guest.client();
        let answer = client.create_container(request);
        let created = self.call("CreateContainer", LONG, answer).await;
        let created = match created.and_then(checked) {
            Ok(created) => created,
            Err(source) => {
                self.undo_create(&id).await;
                return Err(SandboxError::Guest { doing: "cannot create the container", source });
            }
        };
        let record = ContainerRecord {
            id: id.clone(),
            sandbox: self.record.id.clone(),
            config,
            image_id,
            layers: image.layers,
            created_at: now(),
            state: ContainerState::Created,
            log_path,
            mirrors: prepared.mirrors,
            volume_disks: prepared.disks.iter().map(ToString::to_string).collect(),
            stop_signal,
            user: created.user.map(|user| User {
                uid: user.uid,
                gid: user.gid,
                supplemental_groups: user.supplemental_groups,
            }),
            process,
        };
        if let Err(error) = self.save_container(&record).await {
            self.undo_create(&id).await;
            return Err(error);
        }
        self.containers.insert(id.clone(), Container::new(record));
        Ok(id)
    }

    async fn undo_create(&mut self, id: &ObjectId) {
        self.release_cpu_sets().await;
        self.remove_in_guest(id).await;
        self.release_volumes(id).await;
        self.detach_unused().await;
        self.release_mirrors().await;
    }

    async fn image(&self, config: &cri::ContainerConfig) -> Result<Image, SandboxError> {
        self.find_image(config.image.clone().unwrap_or_default().image).await
    }

    pub(super) async fn find_image(&self, name: String) -> Result<Image, SandboxError> {
        let (store, wanted) = (self.context.images.clone(), name.clone());
        let found = tokio::task::spawn_blocking(move || store.find(&wanted)).await.map_err(|_| SandboxError::Ended)?;
        found
            .map_err(|source| SandboxError::Image { image: name.clone(), source })?
            .ok_or(SandboxError::NotFound { what: "image", id: name })
    }

    /// The container whose PID namespace is to be joined, by its id or a prefix of it.
    fn pid_target(&self, config: &cri::ContainerConfig) -> Result<Option<ObjectId>, SandboxError> {
        let context = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let options = context.and_then(|context| context.namespace_options.as_ref());
        let Some(options) = options.filter(|options| options.pid() == cri::NamespaceMode::Target) else {
            return Ok(None);
        };
        let wanted = &options.target_id;
        let mut matches = self.containers.keys().filter(|id| !wanted.is_empty() && id.as_str().starts_with(wanted));
        match (matches.next(), matches.next()) {
            (Some(id), None) => Ok(Some(id.clone())),
            _ => Err(SandboxError::Spec(SpecError::Invalid {
                field: "namespace_options.target_id",
                problem: format!("{:?} is no container of this pod", wanted.chars().take(80).collect::<String>()),
            })),
        }
    }

    /// Plugs the image's disk into the VM and mounts it in the guest, unless it is there.
    pub(super) async fn attach(&mut self, image: &Image) -> Result<(), SandboxError> {
        let id = container::disk_id(&image.id.to_string());
        if self.disks.contains(&id) {
            return Ok(());
        }
        let up = self.up()?.clone();
        let (store, image_id) = (self.context.images.clone(), image.id.clone());
        let disk = tokio::task::spawn_blocking(move || store.disk(&image_id)).await.map_err(|_| SandboxError::Ended)?;
        let disk = disk.map_err(|source| SandboxError::Image { image: image.id.to_string(), source })?;
        let part = |DiskSegment { file, offset, length }| DiskPart { file, offset, length };
        let contents = DiskContents { files: disk.files, parts: disk.segments.into_iter().map(part).collect() };
        let plugged = vmm::add_disk(up.vm.directory(), &id, true, contents).await;
        plugged.map_err(|source| SandboxError::Vmm { doing: "cannot give the image to the VM", source })?;
        let mut client = up.guest.client();
        let verity = Verity { root_hash: disk.verity.root_hash.to_vec(), data_blocks: disk.verity.data_blocks };
        let answer = client.attach_disk(AttachDiskRequest { id: id.to_string(), image: Some(verity) });
        match self.call("AttachDisk", LONG, answer).await {
            Ok(_) => {
                self.disks.insert(id);
                Ok(())
            }
            Err(source) => {
                self.unplug(&id).await;
                Err(SandboxError::Guest { doing: "cannot mount the image in the guest", source })
            }
        }
    }

    /// Takes out the image disks that no container uses any more.
    pub(super) async fn detach_unused(&mut self) {
        let used = |disk: &isopod_proto::DiskId| {
            self.containers.values().any(|container| container.record.disks().any(|other| other == *disk))
        };
        let unused: Vec<_> = self.disks.iter().filter(|disk| !used(disk)).cloned().collect();
        for disk in unused {
            if self.unplug(&disk).await {
                self.disks.remove(&disk);
            }
        }
    }

    /// Whether the disk is out. One that stays is used again by the next container of its image.
    async fn unplug(&self, disk: &isopod_proto::DiskId) -> bool {
        let Ok(up) = self.up() else { return true };
        let mut client = up.guest.client();
        let answer = client.detach_disk(DetachDiskRequest { id: disk.to_string() });
        if let Err(error) = self.call("DetachDisk", LONG, answer).await {
            tracing::warn!(%disk, error = chain(&error), "the guest keeps a disk that is not used");
            return false;
        }
        if let Err(error) = vmm::remove_disk(up.vm.directory(), disk).await {
            tracing::warn!(%disk, error = chain(&error), "the VM keeps a disk that is not used");
        }
        true
    }

    /// StartContainer.
    pub(super) async fn start_container(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        let phase = ContainerPhase::from(&container.record.state);
        self.admit(id, Request::StartContainer(phase))?;
        let result = self.start_process(id).await;
        let state = match &result {
            Ok(()) => ContainerState::Running { started_at: now() },
            Err(error) => ContainerState::start_failed(now(), chain(error)),
        };
        self.set_state(id, state).await?;
        result?;
        self.follow(id)
    }

    async fn start_process(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        // The log is there when the call answers, even if the process has no word to say.
        self.open_log(id)?;
        let mut client = self.up()?.guest.client();
        let answer = client.start_container(StartContainerRequest { id: id.to_string() });
        self.call("StartContainer", LONG, answer).await.map(drop).map_err(guest_failed("cannot start the container"))
    }

    pub(super) async fn set_state(&mut self, id: &ObjectId, state: ContainerState) -> Result<(), SandboxError> {
        let Some(container) = self.containers.get_mut(id) else { return Ok(()) };
        container.record.state = state;
        let record = container.record.clone();
        self.save_container(&record).await
    }

    /// A container's process has ended.
    pub(super) async fn container_ended(&mut self, id: &ObjectId, end: &WaitProcessResponse) {
        let Some(container) = self.containers.get(id).filter(|container| container.is_running()) else { return };
        // Whatever the guest's clock says, it is not later than now.
        let exit = container.record.state.ended(end.exit_code, end.oom_killed, end.finished_at_nanos.min(now()));
        tracing::info!(container = %id, exit_code = exit.exit_code, reason = exit.reason, "container ended");
        self.exit(id, exit).await;
    }

    /// The agent does not know a container's process any more.
    pub(super) async fn container_lost(&mut self, id: &ObjectId, message: String) {
        let Some(container) = self.containers.get(id).filter(|container| container.is_running()) else { return };
        let exit = container.record.state.unknown(now(), message);
        self.exit(id, exit).await;
    }

    pub(super) async fn exit(&mut self, id: &ObjectId, exit: Exit) {
        if let Err(error) = self.set_state(id, ContainerState::Exited(exit)).await {
            // Shown all the same: it is true, and a later daemon finds it out again.
            tracing::error!(container = %id, error = chain(&error), "the end of a container is not kept");
            if let Some(container) = self.containers.get(id) {
                self.context.index.publish_container(&container.record);
            }
        }
        self.release_cpu_sets().await;
        if let Some(container) = self.containers.get_mut(id) {
            container.log = None;
            for reply in container.stop_replies.drain(..) {
                let _ = reply.send(Ok(())); // The client may have gone.
            }
        }
    }

    /// StopContainer: asks once, kills after the grace, answers after the end.
    pub(super) async fn stop_container(&mut self, id: &ObjectId, grace: Duration, reply: Reply<()>) {
        let Some(container) = self.containers.get_mut(id) else {
            let _ = reply.send(Err(not_found(id))); // The client may have gone.
            return;
        };
        let phase = ContainerPhase::from(&container.record.state);
        if phase != ContainerPhase::Running {
            let _ = reply.send(Ok(())); // As above.
            return;
        }
        container.stop_replies.push(reply);
        if grace.is_zero() {
            self.kill_container(id).await;
            return;
        }
        if !std::mem::replace(&mut container.stop_sent, true) {
            let signal = container.record.stop_signal;
            self.signal(id, signal, false).await;
        }
        self.later(grace, Event::GraceOver(id.clone()));
    }

    /// Kills every process of the container.
    pub(super) async fn kill_container(&mut self, id: &ObjectId) {
        if self.containers.get(id).is_some_and(Container::is_running) {
            self.signal(id, SIGKILL, true).await;
            self.later(KILL_DEADLINE, Event::KillOverdue(id.clone()));
        }
    }

    fn later(&mut self, delay: Duration, event: Event) {
        let sender = self.sender.clone();
        self.tasks.spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = sender.send(event); // The driver may end first.
        });
    }

    async fn signal(&self, id: &ObjectId, signal: u32, all: bool) {
        let Ok(up) = self.up() else { return };
        let mut client = up.guest.client();
        let answer = client.signal(SignalRequest { process_id: id.to_string(), signal, all });
        if let Err(error) = self.call("Signal", SHORT, answer).await {
            // It may just have ended. If not, it is killed when its time is up, and its VM with the sandbox.
            tracing::info!(container = %id, signal, error = chain(&error), "a signal was not sent");
        }
    }

    /// RemoveContainer.
    pub(super) async fn remove_container(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        let Some(container) = self.containers.get(id) else { return Ok(()) };
        if container.is_running() {
            self.kill_container(id).await;
            self.until_ended(std::slice::from_ref(id), KILL_DEADLINE, self.stopping.clone()).await;
            if self.containers.get(id).is_some_and(Container::is_running) {
                let seconds = KILL_DEADLINE.as_secs();
                return Err(SandboxError::Late { what: "the end of a killed container", seconds });
            }
        }
        self.remove_in_guest(id).await;
        self.release_volumes(id).await;
        self.context.store.remove_container(id).await?;
        self.containers.remove(id);
        self.context.index.remove_container(id);
        let progress = resources::directory(&self.context, &self.record.id).join(format!("{}.progress", id.short()));
        let _ = std::fs::remove_file(progress); // There is none if it never ran.
        self.release_cpu_sets().await;
        self.detach_unused().await;
        self.release_mirrors().await;
        Ok(())
    }

    pub(super) async fn remove_in_guest(&self, id: &ObjectId) {
        let Ok(up) = self.up() else { return };
        let mut client = up.guest.client();
        let answer = client.remove_container(RemoveContainerRequest { id: id.to_string() });
        if let Err(error) = self.call("RemoveContainer", LONG, answer).await {
            tracing::warn!(container = %id, error = chain(&error), "the guest keeps a removed container");
        }
    }

    /// ReopenContainerLog.
    pub(super) fn reopen_log(&mut self, id: &ObjectId) -> Result<(), SandboxError> {
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        self.admit(id, Request::ReopenLog(ContainerPhase::from(&container.record.state)))?;
        match &container.log {
            Some(log) => Ok(log.reopen()?),
            None => self.open_log(id).map(drop),
        }
    }

    /// ExecSync, in a task of its own.
    pub(super) fn exec(&mut self, id: &ObjectId, command: Vec<String>, limit: Option<Duration>, reply: Reply<Outcome>) {
        let terminal = self.containers.get(id).is_some_and(|container| container.record.config.tty);
        match self.exec_command(id, command, Wanted { tty: terminal, ..Wanted::default() }, limit) {
            Ok((up, command)) => {
                self.tasks.spawn(exec::run(up, command, reply));
            }
            Err(error) => {
                let _ = reply.send(Err(error)); // The client may have gone.
            }
        }
    }

    fn exec_command(
        &self,
        id: &ObjectId,
        command: Vec<String>,
        wanted: Wanted,
        limit: Option<Duration>,
    ) -> Result<(Up, exec::Command), SandboxError> {
        let record = &self.containers.get(id).ok_or_else(|| not_found(id))?.record;
        self.admit(id, Request::Exec(ContainerPhase::from(&record.state)))?;
        // What we wrote ourselves is whole; an empty process would be refused by the agent.
        let first = agent::Process::decode(record.process.as_slice()).unwrap_or_default();
        let process = exec_process(&first, command, wanted.tty, wanted.stdin);
        Ok((self.up()?.clone(), exec::Command { container: id.clone(), process, limit }))
    }

    /// Exec: what its client will run.
    pub(super) fn open_exec(
        &self,
        id: &ObjectId,
        command: Vec<String>,
        wanted: Wanted,
    ) -> Result<(Up, exec::Command), SandboxError> {
        self.exec_command(id, command, wanted, None)
    }

    /// Attach: the container's streams. What was asked for has to fit what the container has.
    pub(super) fn open_attach(&self, id: &ObjectId, wanted: Wanted) -> Result<attach::Target, SandboxError> {
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        self.admit(id, Request::Exec(ContainerPhase::from(&container.record.state)))?;
        let config = &container.record.config;
        let unfit =
            |field, problem: &str| SandboxError::Spec(SpecError::Invalid { field, problem: problem.to_owned() });
        if wanted.tty != config.tty {
            return Err(unfit(
                "tty",
                if config.tty { "the container has a terminal" } else { "the container has none" },
            ));
        }
        if wanted.stdin && !config.stdin {
            return Err(unfit("stdin", "the container was created without standard input"));
        }
        // It is there while the container is followed.
        let log = container.log.as_ref().ok_or(SandboxError::Ended)?;
        Ok(attach::Target {
            up: self.up()?.clone(),
            container: id.clone(),
            output: log.attachers().subscribe(),
            input: Arc::clone(&container.input),
            stdin_once: config.stdin_once,
        })
    }
}

/// What the guest says of the user of a container is kept, and has bounds.
fn checked(created: agent::CreateContainerResponse) -> Result<agent::CreateContainerResponse, GuestError> {
    let groups = created.user.as_ref().map_or(0, |user| user.supplemental_groups.len());
    if groups > MAX_GROUPS {
        let what = format!("a user with {groups} groups, more than there can be");
        return Err(GuestError::Impossible { call: "CreateContainer", what });
    }
    Ok(created)
}

/// Adds the seccomp filter that the configuration asks for. Its profile may be a file of the host.
async fn confine(
    request: &mut agent::CreateContainerRequest,
    config: &cri::ContainerConfig,
) -> Result<(), SandboxError> {
    let Some(process) = &mut request.process else { return Ok(()) };
    let context = config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default();
    let capabilities = process.capabilities.clone().unwrap_or_default();
    let compiled = tokio::task::spawn_blocking(move || container::seccomp_filter(&context, &capabilities)).await;
    let filter = compiled.map_err(|_| SandboxError::Ended)?.map_err(SandboxError::Spec)?;
    (process.seccomp_filter, process.seccomp_flags) = (filter.program, filter.flags);
    Ok(())
}

/// Names the image of a volume by its id, as the kubelet looks for it before it removes images; what it was called is kept.
fn name_image(mount: &mut cri::Mount, id: &str) {
    if let Some(image) = &mut mount.image {
        let called = std::mem::replace(&mut image.image, id.to_owned());
        if image.user_specified_image.is_empty() {
            image.user_specified_image = called;
        }
    }
}

/// Where a container's log goes, beneath the sandbox's directory for logs; none if either part is not given.
fn log_path(directory: &str, path: &str) -> Result<Option<PathBuf>, SpecError> {
    if directory.is_empty() || path.is_empty() {
        return Ok(None);
    }
    let invalid = |field, value: &str, problem| {
        let problem = format!("{:?} {problem}", value.chars().take(200).collect::<String>());
        Err(SpecError::Invalid { field, problem })
    };
    let up = |path: &str| Path::new(path).components().any(|component| component == Component::ParentDir);
    if !directory.starts_with('/') || up(directory) {
        return invalid("sandbox_config.log_directory", directory, "is not an absolute path without \"..\"");
    }
    if path.starts_with('/') || up(path) {
        return invalid("config.log_path", path, "does not lead to a file beneath log_directory");
    }
    Ok(Some(Path::new(directory).join(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_needs_a_directory_and_a_name() {
        assert_eq!(log_path("/var/log/pods/x", "c/0.log"), Ok(Some("/var/log/pods/x/c/0.log".into())));
        assert_eq!(log_path("", "c/0.log"), Ok(None));
        assert_eq!(log_path("/var/log/pods/x", ""), Ok(None));
    }

    #[test]
    fn a_user_with_more_groups_than_there_can_be_is_refused() {
        let created = |groups| {
            let user = agent::ResolvedUser { supplemental_groups: vec![7; groups], ..Default::default() };
            checked(agent::CreateContainerResponse { user: Some(user) })
        };
        assert!(created(MAX_GROUPS).is_ok());
        assert_eq!(created(MAX_GROUPS + 1).expect_err("too many").kind(), isopod_proto::ErrorKind::Corrupt);
    }

    #[test]
    fn a_log_outside_its_directory_is_refused() {
        for (directory, path) in
            [("/var/log", "/etc/passwd"), ("/var/log", "../0.log"), ("/var/log", "a/../../b"), ("log", "0.log")]
        {
            let error = log_path(directory, path).expect_err("outside");
            assert_eq!(error.kind(), isopod_proto::ErrorKind::InvalidArgument);
        }
    }
}
