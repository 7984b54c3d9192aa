//! The log file of a container.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use isopod_proto::ErrorKind;
use parking_lot::Mutex;
use time::OffsetDateTime;

use super::Lines;
use crate::guest::Output;

/// Bytes read from the guest at once.
const CHUNK: usize = 32 * 1024;

/// Which output of the container; a terminal's is stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl LogStream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }

    /// Where in the progress file the number of taken bytes is.
    fn progress_offset(self) -> u64 {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 8,
        }
    }
}

/// A container's log. How much of each stream is in it is kept in a small file beside the VM's sockets, so that a later
/// daemon takes up the streams where this one left them.
pub struct ContainerLog {
    path: Option<PathBuf>,
    file: Mutex<Option<File>>,
    progress: File,
}

/// A log that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open container log {path}")]
pub struct LogError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl LogError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }
}

fn open(path: &Path) -> Result<File, LogError> {
    let opened = || {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        OpenOptions::new().append(true).create(true).mode(0o640).open(path)
    };
    opened().map_err(|source| LogError { path: path.into(), source })
}

impl ContainerLog {
    /// Opens the log at `path`, making it; none means that the output is thrown away. `progress` is made too.
    pub fn open(path: Option<PathBuf>, progress: &Path) -> Result<Self, LogError> {
        let file = path.as_deref().map(open).transpose()?;
        let progress = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(progress)
            .map_err(|source| LogError { path: progress.into(), source })?;
        Ok(Self { path, file: Mutex::new(file), progress })
    }

    /// Opens the path again, after the file was renamed. On an error the old file stays in use.
    pub fn reopen(&self) -> Result<(), LogError> {
        if let Some(path) = &self.path {
            let file = open(path)?;
            *self.file.lock() = Some(file);
        }
        Ok(())
    }

    /// How many bytes of a stream are in the log.
    pub fn taken(&self, stream: LogStream) -> u64 {
        let mut bytes = [0; 8];
        match self.progress.read_exact_at(&mut bytes, stream.progress_offset()) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => 0, // Nothing was written yet.
        }
    }

    fn write(&self, entries: &[u8]) -> io::Result<()> {
        match self.file.lock().as_mut() {
            Some(file) => file.write_all(entries),
            None => Ok(()),
        }
    }

    /// Copies a stream into the log to the stream's end. What is in the log is acknowledged to the guest.
    pub async fn copy(self: Arc<Self>, mut output: Output, stream: LogStream) {
        let mut lines = Lines::default();
        let mut buffer = vec![0; CHUNK];
        let mut entries = Vec::new();
        let mut complained = false;
        loop {
            entries.clear();
            // The VM may have ended: then what is left is as much as there will ever be.
            let count = output.read(&mut buffer).await.unwrap_or(0);
            let now = OffsetDateTime::now_utc();
            let taken = match count {
                0 => lines.finish(stream.name(), now, &mut entries),
                _ => lines.push(&buffer[..count], stream.name(), now, &mut entries),
            };
            // A log that cannot be written loses its text, as it must not stop the container.
            if let Err(error) = self.write(&entries)
                && !complained
            {
                complained = true;
                tracing::error!(path = ?self.path, %error, "container log cannot be written; its text is lost");
            }
            if taken > 0 {
                let total = (output.taken() + taken).to_le_bytes();
                if let Err(error) = self.progress.write_all_at(&total, stream.progress_offset()) {
                    tracing::warn!(%error, "the progress of a container log cannot be kept");
                }
                if output.acknowledge(taken).await.is_err() && count != 0 {
                    tracing::debug!(stream = stream.name(), "the guest no longer takes acknowledgements");
                }
            }
            if count == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reopened_log_is_a_new_file_and_the_old_one_stops_growing() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sub/0.log");
        let log = ContainerLog::open(Some(path.clone()), &directory.path().join("progress")).expect("opened");
        assert!(path.exists());
        log.write(b"one\n").expect("written");
        let old = directory.path().join("sub/0.log.1");
        std::fs::rename(&path, &old).expect("renamed");
        log.reopen().expect("reopened");
        assert!(path.exists());
        log.write(b"two\n").expect("written");
        assert_eq!(std::fs::read(&old).expect("there"), b"one\n");
        assert_eq!(std::fs::read(&path).expect("there"), b"two\n");
    }

    #[test]
    fn a_failed_reopen_makes_no_file_and_keeps_the_old_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sub/0.log");
        let log = ContainerLog::open(Some(path.clone()), &directory.path().join("progress")).expect("opened");
        std::fs::rename(directory.path().join("sub"), directory.path().join("moved")).expect("renamed");
        std::fs::write(directory.path().join("sub"), "in the way").expect("written");
        assert!(log.reopen().is_err());
        log.write(b"more\n").expect("written");
        assert_eq!(std::fs::read(directory.path().join("moved/0.log")).expect("there"), b"more\n");
    }

    #[test]
    fn a_log_is_not_for_everybody() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("0.log");
        let _log = ContainerLog::open(Some(path.clone()), &directory.path().join("progress")).expect("opened");
        assert_eq!(path.metadata().expect("there").permissions().mode() & 0o007, 0);
    }
}
