//! A container's log file, in the format the kubelet reads: `<RFC 3339 time> <stdout|stderr> <F|P> <content>\n`.
//!
//! A line of the container's output becomes entries of at most [`MAX_CONTENT`] bytes, all but the last of them tagged `P`
//! (partial); the reader joins them. What the container wrote without a line's end when it closed the stream is `P` too.
//! The split depends on the bytes alone, never on how they arrive.

mod entry;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use isopod_proto::ErrorKind;
use parking_lot::Mutex;
use rustix::fs::OFlags;
use time::OffsetDateTime;

pub use entry::MAX_CONTENT;
use entry::{Lines, Tag, append};

/// Entries of one call are collected up to about so many bytes, and then written by one system call.
const BATCH: usize = 128 * 1024;

/// The log file of one container. Clones are the same file.
#[derive(Clone, Debug)]
pub struct ContainerLog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: Mutex<File>,
}

/// Which of the container's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output, and everything a container with a terminal writes.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One stream on its way into the log. It keeps the line that has not ended yet.
#[derive(Debug)]
pub struct LogWriter {
    log: ContainerLog,
    stream: LogStream,
    lines: Lines,
    batch: Vec<u8>,
}

/// A log that cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The directory of the file cannot be made.
    #[error("cannot make the directory of the log {path}")]
    Directory {
        /// The log's path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file cannot be opened.
    #[error("cannot open the log {path}")]
    Open {
        /// The log's path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Entries could not be written, and are lost.
    #[error("cannot write {lost} bytes of entries to the log {path}; they are lost")]
    Write {
        /// The log's path.
        path: PathBuf,
        /// Bytes of entries, with their times and tags.
        lost: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl LogError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        let (Self::Directory { source, .. } | Self::Open { source, .. } | Self::Write { source, .. }) = self;
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
            _ => ErrorKind::Internal,
        }
    }
}

impl ContainerLog {
    /// Opens the log at `path`, which is made, with its directories, where it does not exist; what it holds is kept.
    pub fn create(path: &Path) -> Result<Self, LogError> {
        Ok(Self(Arc::new(Inner { path: path.into(), file: Mutex::new(open(path)?) })))
    }

    /// Opens the path anew: the kubelet has renamed the file. The new file exists when this returns, and every entry written
    /// from then on is in it. After an error the old file stays in use.
    pub fn reopen(&self) -> Result<(), LogError> {
        let file = open(&self.0.path)?;
        *self.0.file.lock() = file;
        Ok(())
    }

    /// A writer for one stream. There should be one for each stream, or their lines mix.
    pub fn writer(&self, stream: LogStream) -> LogWriter {
        LogWriter { log: self.clone(), stream, lines: Lines::default(), batch: Vec::new() }
    }

    /// Writes whole entries: all of them or, with an error, none.
    fn write(&self, entries: &[u8]) -> Result<(), LogError> {
        // Held over the loop, so that what a short write leaves is not torn apart by the other stream.
        let mut file = self.0.file.lock();
        let mut rest = entries;
        while !rest.is_empty() {
            match file.write(rest) {
                Ok(count) if count > 0 => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => {
                    take_back(&file, entries.len() - rest.len());
                    let source = result.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                    return Err(LogError::Write { path: self.0.path.clone(), lost: entries.len(), source });
                }
            }
        }
        Ok(())
    }
}

/// Removes the last `count` bytes of the file, so that no torn entry is in front of the next one.
fn take_back(file: &File, count: usize) {
    if count == 0 {
        return;
    }
    let result = file.metadata().and_then(|metadata| file.set_len(metadata.len().saturating_sub(count as u64)));
    if let Err(error) = result {
        tracing::warn!(%error, "a container's log has a torn entry");
    }
}

fn open(path: &Path) -> Result<File, LogError> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(|source| LogError::Directory { path: path.into(), source })?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        // A FIFO in the file's place must not block the daemon.
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
        .open(path)
        .map_err(|source| LogError::Open { path: path.into(), source })
}

impl LogWriter {
    /// Takes bytes of the stream, and writes every line that is whole by now. Whole entries are in the file on return, each in
    /// a single system call. On an error the entries that could not be written are lost, and the writer goes on with the bytes
    /// after them: a container must not stand still because a disk is full.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), LogError> {
        let mut result = Ok(());
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, stream) = (OffsetDateTime::now_utc(), self.stream);
            let batch = &mut self.batch;
            rest = self.lines.push(rest, |tag, content| {
                append(batch, now, stream, tag, content);
                batch.len() < BATCH
            });
            result = result.and(self.flush());
        }
        result
    }

    /// The stream has ended: writes what is left of a line without an end. The writer is empty afterwards.
    pub fn finish(&mut self) -> Result<(), LogError> {
        let rest = self.lines.take();
        for content in rest.chunks(MAX_CONTENT) {
            append(&mut self.batch, OffsetDateTime::now_utc(), self.stream, Tag::Partial, content);
        }
        self.flush()
    }

    /// How many of the bytes that were taken last are kept here for want of a line's end, at most one more than
    /// [`MAX_CONTENT`]. All before them are in the file (or were lost with an error): only those may be acknowledged to the
    /// agent, as these here are lost if the daemon ends.
    pub fn pending(&self) -> usize {
        self.lines.pending()
    }

    fn flush(&mut self) -> Result<(), LogError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let result = self.log.write(&self.batch);
        self.batch.clear();
        result
    }
}

#[cfg(test)]
mod tests;
