//! The threads that make a layer while its bytes arrive.
//!
//! ```text
//! download task --blob--> "layer-inflate": blob digest, inflate --tar--> "layer-write": diff id, convert, sync, rename
//! ```
//! Both queues are short and bounded. The threads belong to the download: when its [`BlobSender`] is dropped before
//! [`BlobSender::end`] they stop at their next read, and the file that was being written is removed.

mod blob;
mod chunks;
mod inflate;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::thread;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};

use self::blob::BlobReader;
use self::chunks::ChunkReader;
use self::inflate::inflate;
#[cfg(feature = "fuzzing")]
pub(crate) use self::inflate::inflate_pieces;
use super::{LayerError, convert, is_disk_full};
use crate::config::Limits;
use crate::digest::Digest;
use crate::durable::sync_parent;
use crate::spool::Spool;

/// What the inflating thread reads at most ahead, in chunks of the network's size.
const BLOB_QUEUE: usize = 32;
const CHUNK: usize = 256 << 10;
const CHUNK_QUEUE: usize = 4;

/// A layer to be made. `keep` is dropped when the threads are done with it, whatever came out.
pub(crate) struct LayerJob<K> {
    /// The digest of the bytes, if one is known.
    pub blob: Option<Digest>,
    pub diff_id: Digest,
    pub limits: Limits,
    /// Where it is written, and what it is renamed to when it is complete. The same file system; the directories exist.
    pub temporary: PathBuf,
    pub target: PathBuf,
    /// Where the bytes are kept while they arrive. What is in it comes before what is sent.
    pub spool: Option<Spool>,
    pub keep: K,
}

enum Message {
    Data(Bytes),
    End,
}

/// The end of the pipeline that bytes go into.
pub(crate) struct BlobSender {
    messages: mpsc::Sender<Message>,
    offset: u64,
}

impl BlobSender {
    /// Bytes of the blob that the pipeline has already; those after them are to be sent.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Hands over the next bytes of the blob; waits while the queue is full. False: the layer has failed, and its result
    /// says why.
    pub(crate) async fn send(&self, data: Bytes) -> bool {
        self.messages.send(Message::Data(data)).await.is_ok()
    }

    /// The same, for a thread that may wait.
    pub(crate) fn send_blocking(&self, data: Bytes) -> bool {
        self.messages.blocking_send(Message::Data(data)).is_ok()
    }

    /// Says that the blob is complete.
    pub(crate) async fn end(self) {
        // If nobody listens any more, the result says why.
        let _ = self.messages.send(Message::End).await;
    }
}

/// Starts the threads. The second part of the result is answered when the layer is in place or has failed.
pub(crate) fn start<K: Send + 'static>(
    mut job: LayerJob<K>,
) -> Result<(BlobSender, oneshot::Receiver<Result<(), LayerError>>), LayerError> {
    let (blob_sender, blob) = mpsc::channel(BLOB_QUEUE);
    let (answer, result) = oneshot::channel();
    let spool = job.spool.take();
    let offset = spool.as_ref().map_or(0, Spool::kept);
    let body = move || {
        let made = make(&job, BlobReader::new(blob, spool));
        drop(job.keep);
        // Nobody waits for the result of a pull that was given up.
        let _ = answer.send(made);
    };
    let thread = thread::Builder::new().name("layer-write".into()).spawn(body);
    thread.map_err(|_| LayerError::Thread { problem: "cannot be started" })?;
    Ok((BlobSender { messages: blob_sender, offset }, result))
}

/// Makes the layer; on failure nothing stays behind but the spool, if another pull can go on with it.
fn make<K>(job: &LayerJob<K>, blob: BlobReader) -> Result<(), LayerError> {
    let spool = blob.spooled();
    let made = write(job, blob);
    if made.is_err() {
        // It may not have come to exist. What cannot be removed now is removed at the next start.
        let _ = fs::remove_file(&job.temporary);
    }
    if let Some(spool) = spool {
        match &made {
            Err(LayerError::Cancelled | LayerError::Input { .. } | LayerError::Thread { .. }) => {}
            Err(LayerError::Write { source }) if is_disk_full(source) => spool.failed(source),
            Err(LayerError::Write { .. }) => {}
            // Made of it, or no good.
            _ => spool.remove(),
        }
    }
    made
}

fn write<K>(job: &LayerJob<K>, blob: BlobReader) -> Result<(), LayerError> {
    let write_error = |source| LayerError::Write { source };
    let made = write_new(
        &job.temporary,
        blob,
        &job.limits,
        Expected { blob: job.blob.as_ref(), diff_id: Some(&job.diff_id) },
    )?;
    made.file.sync_all().map_err(write_error)?;
    fs::rename(&job.temporary, &job.target).map_err(write_error)?;
    sync_parent(&job.target).map_err(write_error)
}

struct Made {
    file: File,
    report: ConvertReport,
}

/// The digests that a blob and the tar in it must have.
#[derive(Clone, Copy)]
struct Expected<'a> {
    blob: Option<&'a Digest>,
    diff_id: Option<&'a Digest>,
}

/// Writes the layer in `blob` to the new file `path`.
fn write_new(path: &Path, blob: BlobReader, limits: &Limits, expected: Expected<'_>) -> Result<Made, LayerError> {
    let file = File::options().read(true).write(true).create_new(true).open(path);
    let file = file.map_err(|source| LayerError::Write { source })?;
    let (chunk_sender, chunks) = sync_channel(CHUNK_QUEUE);
    let input = ChunkReader::new(chunks);
    thread::scope(|scope| {
        let inflating = thread::Builder::new()
            .name("layer-inflate".into())
            .spawn_scoped(scope, move || inflate(blob, &chunk_sender, expected.blob, limits))
            .map_err(|_| LayerError::Thread { problem: "cannot be started" })?;
        let mut tar = None;
        let converted = convert(input, file, limits, |input| {
            let (uuid, diff_id, tar_bytes) = input.check(expected.diff_id)?;
            tar = Some((diff_id, tar_bytes));
            Ok(uuid)
        });
        let inflated = inflating.join().map_err(|_| LayerError::Thread { problem: "died" })?;
        let converted = match (converted, inflated) {
            // Whichever side fails, the other one only sees that it is gone.
            (Err(error), Err(LayerError::Cancelled)) if !matches!(error, LayerError::Input { .. }) => Err(error),
            (_, Err(error)) | (Err(error), Ok(())) => Err(error),
            (Ok(converted), Ok(())) => Ok(converted),
        }?;
        let (diff_id, tar_bytes) = tar.expect("a conversion that succeeded has read its input to the end");
        let report = ConvertReport { diff_id, tar_bytes, erofs_bytes: converted.size, entries: converted.entries };
        Ok(Made { file: converted.file, report })
    })
}

/// A layer that was converted outside a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertReport {
    /// Digest of the tar.
    pub diff_id: Digest,
    /// Bytes of the tar.
    pub tar_bytes: u64,
    /// Bytes of the EROFS.
    pub erofs_bytes: u64,
    /// Entries of the tar.
    pub entries: u64,
}

/// Converts a layer (tar, plain or compressed with gzip or zstd) to an EROFS in the new file `output`, as a pull does, but
/// without expecting any digests and without waiting for the disk at the end. On failure no file stays behind.
pub fn convert_blob<R: Read + Send>(mut input: R, output: &Path, limits: &Limits) -> Result<ConvertReport, LayerError> {
    let (sender, blob) = mpsc::channel(BLOB_QUEUE);
    let made = thread::scope(|scope| {
        let feeding = scope.spawn(move || {
            loop {
                let mut data = vec![0; CHUNK / 4];
                let length = input.read(&mut data).map_err(|source| LayerError::Input { source })?;
                data.truncate(length);
                let message = if length == 0 { Message::End } else { Message::Data(data.into()) };
                // Nobody listening any more is the other side's failure.
                if sender.blocking_send(message).is_err() || length == 0 {
                    return Ok(());
                }
            }
        });
        let made = write_new(output, BlobReader::new(blob, None), limits, Expected { blob: None, diff_id: None });
        feeding.join().map_err(|_| LayerError::Thread { problem: "died" })??;
        made
    });
    match made {
        Ok(made) => Ok(made.report),
        Err(error) => {
            // If it was not this call that made it, it stays.
            if !matches!(&error, LayerError::Write { source } if source.kind() == io::ErrorKind::AlreadyExists) {
                let _ = fs::remove_file(output);
            }
            Err(error)
        }
    }
}

/// The digest of what went through `hasher`, which must be `expected` if that is given.
fn check_digest(
    expected: Option<&Digest>,
    hasher: Sha256,
    mismatch: impl FnOnce(Digest, Digest) -> LayerError,
) -> Result<[u8; 32], LayerError> {
    let bytes: [u8; 32] = hasher.finalize().into();
    let actual = Digest::from_bytes(&bytes);
    match expected {
        Some(expected) if *expected != actual => Err(mismatch(expected.clone(), actual)),
        _ => Ok(bytes),
    }
}
