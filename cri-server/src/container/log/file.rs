//! The log file of a container.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use isopod_proto::ErrorKind;
use parking_lot::Mutex;
use rustix::fs::OFlags;
use time::OffsetDateTime;

use super::Lines;
use super::progress::{Begun, Progress, ProgressFile, Taken};
use crate::guest::Output;
use crate::sandbox::attach::Attachers;

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

    /// Its place in [`Taken`].
    fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }
}

/// A container's log. How much of each stream is in it is kept in a small file beside the VM's sockets, so that a later
/// daemon takes up the streams where this one left them.
pub struct ContainerLog {
    path: Option<PathBuf>,
    state: Mutex<State>,
    progress: ProgressFile,
    /// That it cannot be written was said.
    complained: AtomicBool,
    /// Those who get the output besides.
    attachers: Attachers,
}

struct State {
    file: Option<File>,
    taken: Taken,
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
        match self.source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
            _ => ErrorKind::Internal,
        }
    }
}

fn open(path: &Path) -> Result<File, LogError> {
    let opened = || {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            // A FIFO or a terminal in the file's place must not block the daemon.
            .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
            .open(path)?;
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
    };
    opened().map_err(|source| LogError { path: path.into(), source })
}

/// Writes all of `entries`; or else, with an error, has what was written of them taken back, so that no torn entry is in
/// front of the next one.
fn write_whole<W: Write>(
    target: &mut W,
    entries: &[u8],
    take_back: impl FnOnce(&mut W, usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut rest = entries;
    while !rest.is_empty() {
        match target.write(rest) {
            Ok(count) if count > 0 => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => {
                let written = entries.len() - rest.len();
                if written > 0
                    && let Err(error) = take_back(target, written)
                {
                    tracing::warn!(%error, "a container log has a torn entry");
                }
                return Err(result.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into()));
            }
        }
    }
    Ok(())
}

/// Removes the last `count` bytes of `file`.
fn shorten(file: &mut File, count: usize) -> io::Result<()> {
    let length = file.metadata()?.len();
    file.set_len(length.saturating_sub(count as u64))
}

impl ContainerLog {
    /// Opens the log at `path`, making it; none means that the output is thrown away. `progress` is made too.
    pub fn open(path: Option<PathBuf>, progress: &Path) -> Result<Self, LogError> {
        let kept = ProgressFile::open(progress, path.as_deref());
        let (progress, taken) = kept.map_err(|source| LogError { path: progress.into(), source })?;
        let file = path.as_deref().map(open).transpose()?;
        Ok(Self {
            path,
            state: Mutex::new(State { file, taken }),
            progress,
            complained: AtomicBool::new(false),
            attachers: Attachers::default(),
        })
    }

    /// Opens the path again, after the file was renamed. On an error the old file stays in use.
    pub fn reopen(&self) -> Result<(), LogError> {
        if let Some(path) = &self.path {
            let file = open(path)?;
            self.state.lock().file = Some(file);
        }
        Ok(())
    }

    /// The clients that get the output besides, as it comes.
    pub fn attachers(&self) -> &Attachers {
        &self.attachers
    }

    /// How many bytes of a stream are in the log.
    pub fn taken(&self, stream: LogStream) -> u64 {
        self.state.lock().taken[stream.index()]
    }

    /// Copies a stream into the log to the stream's end. What is in the log is acknowledged to the guest. An error says that
    /// the connection is lost: the stream goes on at [`Output::taken`]; what `lines` keeps comes again.
    pub async fn copy(&self, output: &mut Output, stream: LogStream, lines: &mut Lines) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut entries = Vec::new();
        let mut position = output.taken();
        loop {
            let count = output.read(&mut buffer).await?;
            if count == 0 {
                let taken = self.finish(output.taken(), stream, lines);
                // The guest may have closed its end for good, having nothing that could be acknowledged.
                return if taken > 0 { output.acknowledge(taken).await } else { Ok(()) };
            }
            self.attachers.publish(stream, position, &buffer[..count]);
            position += count as u64;
            entries.clear();
            let taken = lines.push(&buffer[..count], stream.name(), OffsetDateTime::now_utc(), &mut entries);
            if taken > 0 {
                self.take(&entries, stream, output.taken() + taken);
                output.acknowledge(taken).await?;
            }
        }
    }

    /// Nothing comes after the line that `lines` keeps, which begins at `offset`: it is written without its end. Gives its bytes.
    pub fn finish(&self, offset: u64, stream: LogStream, lines: &mut Lines) -> u64 {
        let mut entries = Vec::new();
        let taken = lines.finish(stream.name(), OffsetDateTime::now_utc(), &mut entries);
        if taken > 0 {
            self.take(&entries, stream, offset + taken);
        }
        taken
    }

    /// Writes entries, with which the stream is in the log up to `total`.
    fn take(&self, entries: &[u8], stream: LogStream, total: u64) {
        let mut state = self.state.lock();
        let mut after = state.taken;
        after[stream.index()] = total;
        let written = self.write(&mut state, entries, after);
        state.taken = after;
        match written {
            Ok(true) => return,
            Ok(false) => {}
            // A log that cannot be written loses its text, as it must not stop the container.
            Err(error) if !self.complained.swap(true, Ordering::Relaxed) => {
                tracing::error!(path = ?self.path, %error, "container log cannot be written; its text is lost");
            }
            Err(_) => {}
        }
        self.keep(Progress { taken: after, begun: None });
    }

    /// Writes entries, with which `after` is in the log. False: there is no log.
    fn write(&self, state: &mut State, entries: &[u8], after: Taken) -> io::Result<bool> {
        let Some(file) = &mut state.file else { return Ok(false) };
        let metadata = file.metadata()?;
        let begun = Begun { inode: metadata.ino(), size: metadata.len(), length: entries.len() as u64, after };
        self.keep(Progress { taken: state.taken, begun: Some(begun) });
        write_whole(file, entries, shorten).map(|()| true)
    }

    fn keep(&self, progress: Progress) {
        if let Err(error) = self.progress.keep(progress) {
            tracing::warn!(%error, "the progress of a container log cannot be kept");
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
        log.take(b"one\n", LogStream::Stdout, 4);
        let old = directory.path().join("sub/0.log.1");
        std::fs::rename(&path, &old).expect("renamed");
        log.reopen().expect("reopened");
        assert!(path.exists());
        log.take(b"two\n", LogStream::Stdout, 8);
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
        log.take(b"more\n", LogStream::Stdout, 5);
        assert_eq!(std::fs::read(directory.path().join("moved/0.log")).expect("there"), b"more\n");
    }

    /// A file on a disk with room for so many bytes.
    struct Full(Vec<u8>, usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.1 - self.0.len());
            if count == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.0.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_entry_that_does_not_fit_on_the_disk_leaves_no_torn_one() {
        let mut disk = Full(Vec::new(), 10);
        let take_back = |disk: &mut Full, count: usize| {
            disk.0.truncate(disk.0.len() - count);
            Ok(())
        };
        write_whole(&mut disk, b"first\n", take_back).expect("it fits");
        let error = write_whole(&mut disk, b"second\n", take_back).expect_err("it does not fit");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        write_whole(&mut disk, b"3rd\n", take_back).expect("it fits");
        assert_eq!(disk.0, b"first\n3rd\n");
    }

    #[test]
    fn a_file_is_shortened_at_its_end() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"whole\nto").expect("written");
        shorten(&mut file, 2).expect("shortened");
        assert_eq!(file.metadata().expect("there").len(), 6);
    }

    #[test]
    fn what_is_no_regular_file_is_refused_at_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let progress = directory.path().join("progress");
        let fifo = directory.path().join("0.log");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("made");
        assert!(ContainerLog::open(Some(fifo), &progress).is_err());
        let error = ContainerLog::open(Some("/dev/null".into()), &progress).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Internal);
    }

    #[test]
    fn a_full_disk_is_a_resource_that_is_exhausted() {
        for errno in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT] {
            assert_eq!(LogError { path: "x".into(), source: errno.into() }.kind(), ErrorKind::ResourceExhausted);
        }
    }

    #[test]
    fn a_line_without_an_end_is_finished_and_counted() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("0.log");
        let log = ContainerLog::open(Some(path.clone()), &directory.path().join("progress")).expect("opened");
        let mut lines = Lines::default();
        lines.push(b"rest", "stderr", OffsetDateTime::UNIX_EPOCH, &mut Vec::new());
        assert_eq!(log.finish(7, LogStream::Stderr, &mut lines), 4);
        assert_eq!((log.taken(LogStream::Stderr), log.taken(LogStream::Stdout)), (11, 0));
        assert!(std::fs::read_to_string(&path).expect("text").ends_with(" stderr P rest\n"));
        assert_eq!(log.finish(11, LogStream::Stderr, &mut lines), 0);
        drop(log);
        let log = ContainerLog::open(Some(path), &directory.path().join("progress")).expect("opened");
        assert_eq!((log.taken(LogStream::Stderr), log.taken(LogStream::Stdout)), (11, 0), "by a later daemon");
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
