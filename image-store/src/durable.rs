//! Names and files that outlive a loss of power: they are there whole, or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use redb::Database;

/// Makes the names in the directory of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    parent(path)?.sync_all()
}

fn parent(path: &Path) -> io::Result<File> {
    let parent = path.parent().expect("what is made durable has a name in a directory");
    // Of a relative path with one component.
    File::open(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}

/// Makes a directory for root alone, with those above it that are not there. Durable if only the last of them is new.
pub(crate) fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    sync_parent(path)
}

/// Writes a file, by way of `temporary` in the same file system.
pub(crate) fn write_file(temporary: &Path, target: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(temporary, target)?;
    sync_parent(target)
}

/// Opens a database, making it if it is not there. Of one that is half made when power is lost redb would later say that it is none,
/// and nothing would open it again: so it has another name until it is whole.
pub fn open_database(path: &Path) -> Result<Database, redb::Error> {
    let directory = parent(path)?;
    // Whoever else makes one is waited for.
    directory.lock()?;
    if !path.try_exists()? {
        let new = path.with_extension("new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => drop(Database::create(&new)?),
        }
        fs::rename(&new, path)?;
        directory.sync_all()?;
    }
    Ok(Database::create(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_name_is_in_the_working_directory() {
        sync_parent(Path::new("name")).expect("it is there");
        assert_eq!(sync_parent(Path::new("nowhere/name")).expect_err("no").kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_database_that_was_half_made_is_made_anew() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, half) = (directory.path().join("a.redb"), directory.path().join("a.new"));
        fs::write(&half, [0; 4096]).expect("written");
        let database = open_database(&path).expect("made");
        assert!(!half.exists());
        assert!(matches!(open_database(&path), Err(redb::Error::DatabaseAlreadyOpen)));
        drop(database);
        open_database(&path).expect("opened again");
    }
}
