//! The compressed bytes of layers that are being pulled, so that a pull that is cut, by a crash, a restart or a lost connection,
//! goes on where it was.
//!
//! A spool is a file `ingest/DIFF-ID.BLOB`, written as the bytes arrive and never synced. Nothing in it is trusted: the next pull of
//! the layer sends its bytes through the same hashes as those that come from the registry, from the first one on, and asks the
//! registry for the rest. It goes when the layer is made, when its bytes turn out to be wrong, when it is too old, and when the disk is
//! full. After that nothing is spooled until an image was removed.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use bytes::Bytes;

use crate::config::ResumeConfig;
use crate::digest::Digest;
use crate::layer::is_disk_full;

const CHUNK: usize = 256 << 10;

/// The spools of a store.
pub(crate) struct Spools {
    directory: PathBuf,
    config: ResumeConfig,
    /// Unless the disk was found full.
    room: Arc<AtomicBool>,
}

/// What becomes of the spool of a layer.
pub(crate) enum Use {
    /// The layer is being made.
    Busy,
    /// A pull may come that goes on with it.
    Waiting,
    /// The layer is there.
    Done,
}

impl Spools {
    pub(crate) fn new(directory: PathBuf, config: ResumeConfig) -> Self {
        Self { directory, config, room: Arc::new(AtomicBool::new(true)) }
    }

    /// The spool of a layer that whoever asks alone makes; with what is in it, or emptied. None if its `size` in bytes is not worth
    /// it, or if it cannot be had: a pull does without.
    pub(crate) fn open(&self, diff_id: &Digest, blob: &Digest, size: u64, empty: bool) -> Option<Spool> {
        let wanted = (self.config.min_bytes..=self.config.max_bytes).contains(&size);
        if !wanted || !self.room.load(Ordering::Relaxed) {
            return None;
        }
        let path = self.directory.join(format!("{}.{}", diff_id.hex(), blob.hex()));
        let opened = || {
            let file = File::options().read(true).append(true).create(true).open(&path)?;
            // Another manifest may have told another size of it.
            if empty || file.metadata()?.len() > size {
                file.set_len(0)?;
            }
            let kept = file.metadata()?.len();
            Ok::<_, io::Error>(Spool {
                place: Place { path: path.clone(), room: self.room.clone() },
                file,
                kept,
                read: 0,
            })
        };
        opened().inspect_err(|error| tracing::warn!(%error, path = %path.display(), "a pull is not spooled")).ok()
    }

    /// An image was removed: there may be room again.
    pub(crate) fn found_room(&self) {
        self.room.store(true, Ordering::Relaxed);
    }

    /// Removes the spools that nobody will go on with, or should: those of layers that are done, those that are too old, the oldest
    /// of those that are too much together, and what is none.
    pub(crate) fn tidy(&self, state: impl Fn(&Digest) -> Use) -> Result<(), (PathBuf, io::Error)> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| (path, error)
        };
        let mut waiting = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed(&self.directory))? {
            let entry = entry.map_err(failed(&self.directory))?;
            let path = entry.path();
            let state = diff_id(&path).map_or(Use::Done, |diff_id| state(&diff_id));
            match (state, entry.metadata()) {
                (Use::Busy, _) => {}
                (Use::Waiting, Ok(metadata)) if self.room.load(Ordering::Relaxed) => {
                    waiting.push((
                        metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                        metadata.blocks() * 512,
                        path,
                    ));
                }
                _ => remove(&path).map_err(failed(&path))?,
            }
        }
        waiting.sort();
        let mut total = 0;
        for (modified, bytes, path) in waiting.into_iter().rev() {
            total += bytes;
            // What is of the future was made before the clock was set.
            let age = modified.elapsed().unwrap_or_else(|error| error.duration());
            if age > self.config.max_age || total > self.config.max_bytes {
                remove(&path).map_err(failed(&path))?;
            }
        }
        Ok(())
    }
}

/// The bytes of one layer that have arrived so far.
pub(crate) struct Spool {
    place: Place,
    file: File,
    /// Bytes that were in it, and how many of them were read again.
    kept: u64,
    read: u64,
}

impl Spool {
    /// Bytes that were in it when it was opened.
    pub(crate) fn kept(&self) -> u64 {
        self.kept
    }

    pub(crate) fn place(&self) -> Place {
        self.place.clone()
    }

    /// The next of the bytes that were in it, at most 256 KiB; none after the last one.
    pub(crate) fn next(&mut self) -> io::Result<Option<Bytes>> {
        let length = (self.kept - self.read).min(CHUNK as u64);
        if length == 0 {
            return Ok(None);
        }
        let mut chunk = vec![0; length as usize];
        self.file.read_exact(&mut chunk)?;
        self.read += length;
        Ok(Some(chunk.into()))
    }

    /// Adds bytes that have arrived. False: it is given up, and removed.
    pub(crate) fn append(&mut self, data: &[u8]) -> bool {
        let written = match self.place.room.load(Ordering::Relaxed) {
            true => self.file.write_all(data),
            false => Err(io::ErrorKind::StorageFull.into()),
        };
        written.inspect_err(|error| self.place.failed(error)).is_ok()
    }
}

/// Where a spool is.
#[derive(Clone)]
pub(crate) struct Place {
    path: PathBuf,
    room: Arc<AtomicBool>,
}

impl Place {
    /// Removes the spool.
    pub(crate) fn remove(&self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "a spool is not removed");
        }
    }

    /// The spool, or what is made of it, cannot be written.
    pub(crate) fn failed(&self, error: &io::Error) {
        if is_disk_full(error) && self.room.swap(false, Ordering::Relaxed) {
            tracing::warn!("the disk is full: pulls that are cut now begin anew, until an image is removed");
        }
        self.remove();
    }
}

/// The layer whose spool `path` is.
fn diff_id(path: &Path) -> Option<Digest> {
    let (diff_id, blob) = path.file_name()?.to_str()?.split_once('.')?;
    Digest::parse(&format!("sha256:{blob}")).ok()?;
    Digest::parse(&format!("sha256:{diff_id}")).ok()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
