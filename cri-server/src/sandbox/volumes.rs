//! What a driver does for the volumes of its containers.

use std::fs::File;
use std::path::PathBuf;

use isopod_proto::agent::{self, AttachDiskRequest, AttachFileSystemRequest};
use isopod_proto::{DiskId, ObjectId};

use super::driver::Driver;
use super::{SandboxError, resources};
use crate::container;
use crate::grpc::status::chain;
use crate::guest::LONG;
use crate::vmm::{self, DiskContents};
use crate::volume::device::{self, Taken, Wanted};
use crate::volume::host;
use crate::volume::kubelet;
use crate::volume::plan::{Access, HostSource, Source, Volume};
use crate::volume::server::{self, FileServerRecord, Starting};

/// What a container's volumes are to the agent, and what they hold.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    pub mounts: Vec<agent::Mount>,
    pub devices: Vec<agent::Device>,
    /// Disks of images that are volumes, and of devices.
    pub disks: Vec<DiskId>,
    /// Which mount is of which image, by its id.
    pub images: Vec<(usize, String)>,
    /// Host paths of volumes that are mirrors.
    pub mirrors: Vec<PathBuf>,
}

/// What all names of a container's shares begin with.
fn share_prefix(id: &ObjectId) -> String {
    format!("{}.", id.short())
}

impl Driver {
    /// Makes the host's side of `volumes` and `devices`. If that fails, what was made goes with [`Driver::release_volumes`].
    pub(super) async fn prepare_volumes(
        &mut self,
        id: &ObjectId,
        volumes: Vec<Volume>,
        devices: Vec<Wanted>,
    ) -> Result<Prepared, SandboxError> {
        let mut prepared = Prepared::default();
        for (number, Volume { destination, source }) in volumes.into_iter().enumerate() {
            let (source, readonly) = match source {
                Source::Host(source) if self.mirror(&source).await? => {
                    let name = kubelet::guest_name(&source.path);
                    prepared.mirrors.push(source.path);
                    (agent::mount::Source::Mirror(name), true)
                }
                Source::Host(source) => match self.empty_dir(&source).await? {
                    Some(volume) => (agent::mount::Source::Volume(volume), source.access != Access::Writable),
                    None => {
                        let name = format!("{}{number}", share_prefix(id));
                        let readonly = self.share(name.clone(), source).await?;
                        (agent::mount::Source::Share(name), readonly)
                    }
                },
                Source::Image { image, sub_path } => {
                    let image = self.find_image(image).await?;
                    let disk = container::disk_id(&image.id.to_string());
                    prepared.images.push((number, image.id.to_string()));
                    self.attach(&image).await?;
                    prepared.disks.push(disk.clone());
                    let volume = agent::ImageVolume { disk: disk.to_string(), sub_path };
                    (agent::mount::Source::Image(volume), true)
                }
            };
            prepared.mounts.push(agent::Mount { destination, source: Some(source), readonly, mode: 0 });
        }
        for (number, wanted) in devices.into_iter().enumerate() {
            let disk = DiskId::parse(&format!("d{}-{number}", id.short())).map_err(|_| SandboxError::Ended)?;
            let device = self.prepare_device(&disk, wanted).await?;
            if matches!(device.source, Some(agent::device::Source::Disk(_))) {
                prepared.disks.push(disk);
            }
            prepared.devices.push(device);
        }
        Ok(prepared)
    }

    /// Gives a device to the VM, as `disk` if it is one.
    async fn prepare_device(&mut self, disk: &DiskId, wanted: Wanted) -> Result<agent::Device, SandboxError> {
        let (path, writable) = (wanted.path.clone(), wanted.writable);
        let (source, node) = match blocking(move || device::take(&wanted)).await?.map_err(SandboxError::Device)? {
            Taken::Guest(name, node) => (agent::device::Source::Guest(name), node),
            Taken::Block(file, length, node) => {
                let plugged =
                    vmm::add_disk(self.up()?.vm.directory(), disk, !writable, DiskContents::one(file, length)).await;
                plugged.map_err(|source| SandboxError::Vmm { doing: "cannot give a device to the VM", source })?;
                // From here on it is taken out when no container has it.
                self.disks.insert(disk.clone());
                let mut client = self.up()?.guest.client();
                let answer = client.attach_disk(AttachDiskRequest { id: disk.to_string(), image: None });
                let attached = self.call("AttachDisk", LONG, answer).await;
                attached.map_err(|source| SandboxError::Guest { doing: "the guest does not find a device", source })?;
                (agent::device::Source::Disk(disk.to_string()), node)
            }
        };
        Ok(agent::Device { path, source: Some(source), mode: node.mode })
    }

    /// Shares a directory or file of the host with the guest. Returns whether nothing in it can be written.
    async fn share(&mut self, name: String, source: HostSource) -> Result<bool, SandboxError> {
        let wanted = source.clone();
        let tree = blocking(move || host::take(&wanted)).await?.map_err(SandboxError::HostPath)?;
        let readonly = tree.all_readonly;
        self.start_file_server().await?;
        let directory = resources::directory(&self.context, &self.record.id);
        blocking(move || server::add_share(&directory, name, &source, tree)).await?.map_err(SandboxError::Files)?;
        Ok(readonly)
    }

    /// Starts the pod's file server and mounts it in the guest, unless that has been done.
    async fn start_file_server(&mut self) -> Result<(), SandboxError> {
        if self.record.file_server.as_ref().is_some_and(|server| server.mounted) {
            return Ok(());
        }
        // One of which nobody knows how far it came.
        resources::end_file_server(&self.context, &self.record).await;
        let directory = resources::directory(&self.context, &self.record.id);
        let (binary, cgroup) = (self.context.config.vmm.file_server.clone(), self.record.cgroup.clone());
        let (place, cgroup) = (directory.clone(), cgroup.unwrap_or_default());
        let starting = blocking(move || Starting::new(&binary, &place, &cgroup)).await?.map_err(SandboxError::Files)?;
        let process = starting.identity();
        self.record.file_server = Some(FileServerRecord { process, mounted: false });
        self.save().await?;
        let fuse = blocking(move || starting.go()).await?.map_err(SandboxError::Files)?;
        // Not a name that a server before it may have had: the VM keeps that one's device.
        let tag = format!("shares-{}", process.pid);
        let plugged = vmm::add_file_system(&directory, &tag, File::from(fuse)).await;
        plugged.map_err(|source| SandboxError::Vmm { doing: "cannot give a file system to the VM", source })?;
        let mut client = self.up()?.guest.client();
        let answer = client.attach_file_system(AttachFileSystemRequest { tag });
        let mounted = self.call("AttachFileSystem", LONG, answer).await;
        mounted.map_err(|source| SandboxError::Guest { doing: "cannot mount a file system in the guest", source })?;
        self.record.file_server = Some(FileServerRecord { process, mounted: true });
        self.save().await
    }

    /// Takes back what the container shares of the host. The guest must have let go of it.
    pub(super) async fn release_volumes(&self, id: &ObjectId) {
        if self.record.file_server.is_none() || self.up.is_none() {
            return;
        }
        let directory = resources::directory(&self.context, &self.record.id);
        let prefix = share_prefix(id);
        match blocking(move || server::remove_shares(&directory, prefix)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(container = %id, error = chain(&error), "the shares of a container stay"),
            Err(error) => tracing::warn!(container = %id, error = chain(&error), "the shares of a container stay"),
        }
    }
}

pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, SandboxError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| SandboxError::Ended)
}
