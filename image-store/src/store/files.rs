//! Small files of a store.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::OpenError;
use crate::layer::sync_parent;

pub(super) const VERSION: &str = "isopod image store, version 2\n";
/// The former one, with a partition table for each image. What is missing in such a store is made when it is opened.
const VERSION_1: &str = "isopod image store, version 1\n";

/// Checks the version file; writes it if nothing else is there yet, or what a former version has made.
pub(super) fn check_version(root: &Path) -> Result<(), OpenError> {
    let path = root.join("version");
    let write = |path: PathBuf| {
        let written = write_durably(&root.join("version.new"), &path, VERSION.as_bytes());
        written.map_err(|source| OpenError::Io { path, source })
    };
    match fs::read_to_string(&path) {
        Ok(version) if version == VERSION => Ok(()),
        Ok(version) if version == VERSION_1 => write(path),
        Ok(_) => Err(OpenError::Version { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !root.join("metadata.redb").exists() => write(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(OpenError::Version { path }),
        Err(source) => Err(OpenError::Io { path, source }),
    }
}

/// Writes a file so that it is there whole or not at all.
fn write_durably(temporary: &Path, target: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(temporary, target)?;
    sync_parent(target)
}

/// Removes a file; one that is not there is a success.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
