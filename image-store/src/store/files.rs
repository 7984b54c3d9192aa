//! Small files of a store.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use super::OpenError;
use crate::layer::sync_parent;

pub(super) const VERSION: &str = "isopod image store, version 1\n";

/// Checks the version file; writes it if nothing else is there yet.
pub(super) fn check_version(root: &Path) -> Result<(), OpenError> {
    let path = root.join("version");
    match fs::read_to_string(&path) {
        Ok(version) if version == VERSION => Ok(()),
        Ok(_) => Err(OpenError::Version { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !root.join("metadata.redb").exists() => {
            let written = write_durably(&root.join("version.new"), &path, &[VERSION.as_bytes()]);
            written.map_err(|source| OpenError::Io { path, source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(OpenError::Version { path }),
        Err(source) => Err(OpenError::Io { path, source }),
    }
}

/// Writes a file so that it is there whole or not at all.
pub(super) fn write_durably(temporary: &Path, target: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = File::create(temporary)?;
    for part in parts {
        file.write_all(part)?;
    }
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
