//! CreateContainer: from a configuration to a container in the guest, or to nothing.

use std::path::{Component, Path, PathBuf};

use isopod_image_store::Image;
use isopod_proto::{ObjectId, agent};
use prost::Message;

use super::admission::Request;
use super::driver::{Container, Driver};
use super::{SandboxError, now};
use crate::container::{self, ContainerRecord, ContainerState, SpecError, User, create_request};
use crate::cri;
use crate::guest::{GuestError, LONG};
use crate::volume;

/// Most groups a process can have in Linux (NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

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
