//! Small files of a store.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::OpenError;
use crate::durable;

pub(super) const VERSION: &str = "isopod image store, version 2\n";
/// The former one, with a partition table for each image. What is missing in such a store is made when it is opened.
const VERSION_1: &str = "isopod image store, version 1\n";

/// Checks the version file; writes it if nothing else is there yet, or what a former version has made.
pub(super) fn check_version(root: &Path) -> Result<(), OpenError> {
    let path = root.join("version");
    let write = |path: PathBuf| {
        let written = durable::write_file(&root.join("version.new"), &path, VERSION.as_bytes());
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

/// Removes a file; one that is not there is a success.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
