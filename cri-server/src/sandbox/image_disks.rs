//! The disks of images in a VM: one an image, plugged in for its first container and taken out after its last.

use isopod_image_store::{DiskSegment, Image};
use isopod_proto::DiskId;
use isopod_proto::agent::{AttachDiskRequest, DetachDiskRequest, Verity};

use super::SandboxError;
use super::driver::Driver;
use crate::container;
use crate::grpc::status::chain;
use crate::guest::LONG;
use crate::vmm::{self, DiskContents, DiskPart};

impl Driver {
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
        let used = |disk: &DiskId| {
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
    async fn unplug(&self, disk: &DiskId) -> bool {
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
}
