//! The disks of images: metadata files that are made of layers' files, and shown in front of them.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::io_error;
use super::{Inner, StoreError};
use crate::digest::{Digest, ImageId};
use crate::erofs::ALIGNMENT;
use crate::image::{DiskSegment, ImageDisk};
use crate::merge::merge;

/// The metadata file of an image, complete and durable but not yet under its name. It is removed unless it is put there.
pub(super) struct NewDisk {
    temporary: PathBuf,
    target: PathBuf,
}

impl Inner {
    /// The metadata file of an image.
    pub(super) fn disk_path(&self, id: &ImageId) -> PathBuf {
        self.config.root.join("images").join(format!("{}.erofs", id.hex()))
    }

    /// Makes the metadata file of an image whose layers are all here and stay. No other thread may be making the same.
    pub(super) fn make_disk(&self, id: &ImageId, layers: &[Digest]) -> Result<NewDisk, StoreError> {
        let new = NewDisk { temporary: self.temporary_path(id), target: self.disk_path(id) };
        let layers: Vec<PathBuf> = layers.iter().map(|layer| self.layer_path(layer)).collect();
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&new.temporary);
        let file = file.map_err(io_error(&new.temporary, "made"))?;
        let merged = merge(&layers, file, id.first_half(), &self.config.limits);
        let merged = merged.map_err(|source| StoreError::Merge { image: id.clone(), source })?;
        merged.sync_all().map_err(io_error(&new.temporary, "written"))?;
        Ok(new)
    }

    /// The disk of an image whose files are all here.
    pub(super) fn open_disk(&self, id: &ImageId, layers: &[Digest]) -> Result<ImageDisk, StoreError> {
        let paths = std::iter::once(self.disk_path(id)).chain(layers.iter().map(|layer| self.layer_path(layer)));
        let open = |path: PathBuf| {
            let file = File::open(&path).map_err(io_error(&path, "opened"))?;
            let length = file.metadata().map_err(io_error(&path, "read"))?.len();
            Ok(DiskSegment { file, offset: 0, length })
        };
        Ok(ImageDisk { segments: paths.map(open).collect::<Result<_, _>>()? })
    }

    /// Bytes that the files of an image take.
    pub(super) fn size(&self, id: &ImageId, layers: &[Digest]) -> Result<u64, StoreError> {
        let paths = std::iter::once(self.disk_path(id)).chain(layers.iter().map(|layer| self.layer_path(layer)));
        paths.map(|path| allocated(&path)).sum()
    }

    /// Gives a layer's file that a former version has made the length that they have now.
    pub(super) fn align_layer(&self, layer: &Digest) -> Result<(), StoreError> {
        let path = self.layer_path(layer);
        let length = fs::metadata(&path).map_err(io_error(&path, "read"))?.len();
        if length.is_multiple_of(ALIGNMENT) {
            return Ok(());
        }
        let file = File::options().write(true).open(&path).map_err(io_error(&path, "opened"))?;
        let aligned = file.set_len(length.next_multiple_of(ALIGNMENT)).and_then(|()| file.sync_all());
        aligned.map_err(io_error(&path, "written"))
    }
}

impl NewDisk {
    /// Gives the file its name. Durable when it returns.
    pub(super) fn put(self) -> Result<(), StoreError> {
        let put = fs::rename(&self.temporary, &self.target).and_then(|()| crate::layer::sync_parent(&self.target));
        put.map_err(io_error(&self.target, "written"))
    }
}

impl Drop for NewDisk {
    fn drop(&mut self) {
        // It is not there if it was put under its name. What cannot be removed now is removed at the next start.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn allocated(path: &Path) -> Result<u64, StoreError> {
    Ok(fs::metadata(path).map_err(io_error(path, "read"))?.blocks() * 512)
}
