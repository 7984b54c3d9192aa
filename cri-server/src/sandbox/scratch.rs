//! The scratch disk of a pod, for what its containers change of their images. It does not outlive the VM.

use std::fs::File;
use std::path::{Path, PathBuf};

use isopod_proto::ObjectId;

use crate::ext4::{Ext4Error, Kind};

/// The directory of scratch disks and of the templates of file systems.
pub fn directory(root: &Path) -> PathBuf {
    root.join("scratch")
}

/// Where a sandbox's scratch disk is.
pub fn path(root: &Path, sandbox: &ObjectId) -> PathBuf {
    directory(root).join(format!("{sandbox}.ext4"))
}

/// Makes the template of scratch disks of `bytes` bytes, unless it is there. Blocks.
pub fn prepare(root: &Path, bytes: u64) -> Result<(), Ext4Error> {
    kind(bytes).prepare(&directory(root)).map(drop)
}

/// Makes a sandbox's scratch disk of `bytes` bytes. Blocks.
pub fn make(root: &Path, sandbox: &ObjectId, bytes: u64) -> Result<File, Ext4Error> {
    kind(bytes).make(&directory(root), &path(root, sandbox))
}

fn kind(bytes: u64) -> Kind {
    Kind { bytes, journal: false }
}
