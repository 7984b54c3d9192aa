//! The disks of images: metadata files that are made of layers' files, and shown in front of them.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::io_error;
use super::{Inner, StoreError};
use crate::digest::{Digest, ImageId};
use crate::erofs::{BLOCK_SIZE, data_bytes};
use crate::image::{DiskSegment, ImageDisk, Verity};
use crate::merge::merge;
use crate::verity;

/// The metadata file of an image, complete and durable but not yet under its name. It is removed unless it is put there.
pub(super) struct NewDisk {
    name: NewName,
    pub verity: Verity,
}

struct NewName {
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
        let (temporary, target) = (self.temporary_path(id), self.disk_path(id));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&temporary);
        let file = file.map_err(io_error(&temporary, "made"))?;
        // From here on it is removed again if anything fails.
        let name = NewName { temporary, target };
        let layers: Vec<PathBuf> = layers.iter().map(|layer| self.layer_path(layer)).collect();
        let merged = merge(&layers, file, id.first_half(), &self.config.limits);
        let (file, merged) = merged.map_err(|source| StoreError::Merge { image: id.clone(), source })?;
        file.sync_all().map_err(io_error(&name.temporary, "written"))?;
        Ok(NewDisk { name, verity: merged.verity })
    }

    /// The disk of an image whose files are all here.
    pub(super) fn open_disk(&self, id: &ImageId, layers: &[Digest], verity: Verity) -> Result<ImageDisk, StoreError> {
        let paths = self.disk_files(id, layers);
        let files = paths.iter().map(|path| File::open(path).map_err(io_error(path, "opened")));
        let files: Vec<File> = files.collect::<Result<_, _>>()?;
        let lengths = files.iter().zip(&paths);
        let lengths = lengths.map(|(file, path)| Ok(file.metadata().map_err(io_error(path, "read"))?.len()));
        let lengths: Vec<u64> = lengths.collect::<Result<_, _>>()?;
        // Of what else than its data a file consists: hashes.
        let damaged = |file: usize| StoreError::Length { path: paths[file].clone() };
        let mut data = vec![0; files.len()];
        for file in 1..files.len() {
            data[file] = verity::data_bytes(lengths[file]).ok_or_else(|| damaged(file))?;
        }
        let rest = (verity.data_blocks * BLOCK_SIZE as u64).checked_sub(data.iter().sum());
        data[0] = rest.filter(|rest| (1..lengths[0]).contains(rest)).ok_or_else(|| damaged(0))?;
        let front = (0..files.len()).map(|file| DiskSegment { file, offset: 0, length: data[file] });
        let behind = |file| DiskSegment { file, offset: data[file], length: lengths[file] - data[file] };
        let segments = front.chain((0..files.len()).map(behind)).collect();
        Ok(ImageDisk { files, segments, verity })
    }

    /// Bytes that the files of an image take.
    pub(super) fn size(&self, id: &ImageId, layers: &[Digest]) -> Result<u64, StoreError> {
        self.disk_files(id, layers).iter().map(|path| allocated(path)).sum()
    }

    /// The files that an image's disk is made of.
    fn disk_files(&self, id: &ImageId, layers: &[Digest]) -> Vec<PathBuf> {
        std::iter::once(self.disk_path(id)).chain(layers.iter().map(|layer| self.layer_path(layer))).collect()
    }

    /// Gives a layer's file that a former version has made the hashes that it has now.
    pub(super) fn complete_layer(&self, layer: &Digest) -> Result<(), StoreError> {
        let path = self.layer_path(layer);
        let file = File::options().read(true).write(true).open(&path).map_err(io_error(&path, "opened"))?;
        let length = file.metadata().map_err(io_error(&path, "read"))?.len();
        let data = data_bytes(&file).map_err(|_| StoreError::Length { path: path.clone() })?;
        if length == data + verity::level_0_bytes(data) {
            return Ok(());
        }
        tracing::info!(path = %path.display(), "hashing a layer of a former version");
        let hashed = file.set_len(data).and_then(|()| verity::hash_file(&file, data));
        let appended = hashed.and_then(|hashes| verity::append_level_0(&file, data, &hashes));
        appended.map_err(io_error(&path, "written"))
    }
}

impl NewDisk {
    /// Gives the file its name. Durable when it returns.
    pub(super) fn put(self) -> Result<(), StoreError> {
        let NewName { temporary, target } = &self.name;
        let put = fs::rename(temporary, target).and_then(|()| crate::durable::sync_parent(target));
        put.map_err(io_error(target, "written"))
    }
}

impl Drop for NewName {
    fn drop(&mut self) {
        // It is not there if it was put under its name. What cannot be removed now is removed at the next start.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn allocated(path: &Path) -> Result<u64, StoreError> {
    Ok(fs::metadata(path).map_err(io_error(path, "read"))?.blocks() * 512)
}
