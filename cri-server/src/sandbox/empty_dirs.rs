//! The emptyDir volumes that a pod has in its guest ([`crate::volume::empty_dir`]). Each stays until the VM ends: the kubelet may
//! replace every container of the pod, and what is in the volume is to be still there.

use std::path::Path;

use isopod_proto::agent::{self, AttachDiskRequest, MakeVolumeRequest, make_volume_request};
use isopod_proto::{DiskId, ErrorKind};

use super::driver::Driver;
use super::volumes::blocking;
use super::{SandboxError, resources, scratch};
use crate::ext4::Kind;
use crate::guest::LONG;
use crate::vmm::{self, DiskContents};
use crate::volume::empty_dir::{self, EmptyDir, Shape};
use crate::volume::kubelet;
use crate::volume::plan::HostSource;

/// What the names of the volumes' disks begin with.
pub(super) const DISK_PREFIX: &str = "v-";

impl Driver {
    /// The volume that `source` is, in the guest, if it is an emptyDir of the pod; it is made if the guest has it not yet. None: it
    /// is to be shared.
    pub(super) async fn empty_dir(&mut self, source: &HostSource) -> Result<Option<agent::PodVolume>, SandboxError> {
        let (path, uid) = (source.path.clone(), self.record.config.metadata.clone().unwrap_or_default().uid);
        let found = blocking(move || empty_dir::find(&path, &uid)).await?.map_err(SandboxError::EmptyDir)?;
        let Some(EmptyDir { volume, sub_path }) = found else { return Ok(None) };
        let name = kubelet::guest_name(&volume);
        if !self.empty_dirs.contains(&name) {
            let looked = volume.clone();
            let shape = blocking(move || empty_dir::look(&looked)).await?.map_err(SandboxError::EmptyDir)?;
            let Some(shape) = shape else { return Ok(None) };
            self.make_empty_dir(&name, &volume, shape).await?;
            self.empty_dirs.insert(name.clone());
        }
        Ok(Some(agent::PodVolume { name, sub_path }))
    }

    /// Makes the volume in the guest. What of it an earlier daemon has made is there already.
    async fn make_empty_dir(&mut self, name: &str, volume: &Path, shape: Shape) -> Result<(), SandboxError> {
        let disk = DiskId::parse(&format!("{DISK_PREFIX}{}", &name[..16])).map_err(|_| SandboxError::Ended)?;
        let storage = match shape.memory {
            Some(bytes) => make_volume_request::Storage::TmpfsSizeBytes(bytes),
            None => {
                self.plug_empty_dir(&disk, volume).await?;
                make_volume_request::Storage::Disk(disk.to_string())
            }
        };
        let (uid, gid) = shape.owner;
        let request = MakeVolumeRequest { name: name.to_owned(), storage: Some(storage), mode: shape.mode, uid, gid };
        let mut client = self.up()?.guest.client();
        let made = self.call("MakeVolume", LONG, client.make_volume(request)).await;
        made.map_err(|source| SandboxError::Guest { doing: "the guest does not make a volume", source })?;
        // It is no container's, and stays.
        self.disks.remove(&disk);
        Ok(())
    }

    async fn plug_empty_dir(&mut self, disk: &DiskId, volume: &Path) -> Result<(), SandboxError> {
        let refused = |source| SandboxError::Vmm { doing: "cannot give a volume to the VM", source };
        let directory = resources::directory(&self.context, &self.record.id);
        if !vmm::disks(&directory).await.map_err(refused)?.contains(&disk.to_string()) {
            let root = &self.context.config.root;
            let (templates, scratch) = (scratch::directory(root), scratch::path(root, &self.record.id));
            let (volume, configured) = (volume.to_owned(), self.context.config.vmm.scratch_bytes);
            let open = move || {
                // The VMM's jail lets it write no file beyond the end of the scratch disk that it was started with.
                let bytes = std::fs::metadata(scratch).map_or(configured, |metadata| metadata.len());
                empty_dir::disk(&volume, &templates, Kind { bytes, journal: true })
            };
            let (file, length) = blocking(open).await?.map_err(SandboxError::EmptyDir)?;
            vmm::add_disk(&directory, disk, false, DiskContents::one(file, length)).await.map_err(refused)?;
        }
        // Until the volume is made, it is taken out as what no container has.
        self.disks.insert(disk.clone());
        let mut client = self.up()?.guest.client();
        let answer = client.attach_disk(AttachDiskRequest { id: disk.to_string(), image: None });
        match self.call("AttachDisk", LONG, answer).await {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                Err(SandboxError::Guest { doing: "the guest does not find a volume's disk", source: error })
            }
            _ => Ok(()),
        }
    }
}
