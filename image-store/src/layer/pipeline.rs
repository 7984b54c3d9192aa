//! The threads that make a layer while its bytes arrive.
//!
//! ```text
//! download task --blob--> "layer-inflate": blob digest, inflate --tar--> "layer-write": diff id, convert, sync, rename
//! ```
//! Both queues are short and bounded. The threads belong to the download: when its [`BlobSender`] is dropped before
//! [`BlobSender::end`] they stop at their next read, and the file that was being written is removed.

use std::fs::{self, File};
use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use bytes::{Buf, Bytes};
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};

use super::{LayerError, convert, is_disk_full};
use crate::config::Limits;
use crate::digest::Digest;
use crate::spool::Spool;

/// What the inflating thread reads at most ahead, in chunks of the network's size.
const BLOB_QUEUE: usize = 32;
const CHUNK: usize = 256 << 10;
const CHUNK_QUEUE: usize = 4;
/// Layers below this size may be of any ratio.
const RATIO_FREE: u64 = 16 << 20;

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
    let spool = blob.spool.as_ref().map(Spool::place);
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
    let input = ChunkReader { chunks, chunk: Vec::new(), position: 0, hasher: Sha256::new(), count: 0, ended: false };
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
/// without expecting any digests and without syncing. On failure no file stays behind.
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

/// Makes the names in the directory of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().expect("paths in the store have parents"))?.sync_all()
}

/// The compressed bytes: those that were kept, and then as they come.
struct BlobReader {
    blob: mpsc::Receiver<Message>,
    spool: Option<Spool>,
    current: Bytes,
    hasher: Sha256,
    count: u64,
    ended: bool,
    cancelled: bool,
}

impl BlobReader {
    fn new(blob: mpsc::Receiver<Message>, spool: Option<Spool>) -> Self {
        Self { blob, spool, current: Bytes::new(), hasher: Sha256::new(), count: 0, ended: false, cancelled: false }
    }

    fn hash(&mut self, data: Bytes) {
        self.hasher.update(&data);
        self.count += data.len() as u64;
        self.current = data;
    }
}

impl BufRead for BlobReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() && !self.ended {
            match self.spool.as_mut().map_or(Ok(None), Spool::next) {
                Ok(None) => {}
                Ok(Some(data)) => {
                    self.hash(data);
                    break;
                }
                // Whoever sends goes on behind what cannot be read: without that, no digest is right.
                Err(_) => {
                    self.ended = true;
                    break;
                }
            }
            match self.blob.blocking_recv() {
                Some(Message::Data(data)) => {
                    self.spool.take_if(|spool| !spool.append(&data));
                    self.hash(data);
                }
                Some(Message::End) => self.ended = true,
                None => {
                    self.cancelled = true;
                    return Err(io::Error::other("the download was given up"));
                }
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, amount: usize) {
        self.current.advance(amount);
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

/// A blob's bytes, decompressed. What it is compressed with is told by its first bytes, as media types are often wrong.
enum Inflater {
    Plain(BlobReader),
    Gzip(Box<flate2::bufread::MultiGzDecoder<BlobReader>>),
    Zstd(zstd::stream::read::Decoder<'static, BlobReader>),
}

impl Inflater {
    fn new(mut blob: BlobReader) -> io::Result<Self> {
        // Enough of the first bytes are in one piece unless the network is odd; they are put together then.
        let mut start = blob.fill_buf()?.to_vec();
        while start.len() < 4 && !blob.ended {
            let length = blob.current.len();
            blob.consume(length);
            start.extend_from_slice(blob.fill_buf()?);
            blob.current = Bytes::copy_from_slice(&start);
        }
        Ok(match start.as_slice() {
            [0x1f, 0x8b, ..] => Self::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(blob))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd(zstd::stream::read::Decoder::with_buffer(blob)?),
            // A skippable frame, which may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd(zstd::stream::read::Decoder::with_buffer(blob)?),
            _ => Self::Plain(blob),
        })
    }

    fn blob(&self) -> &BlobReader {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Zstd(decoder) => decoder.get_ref(),
        }
    }

    fn into_blob(self) -> BlobReader {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
        }
    }

    /// Fills `buffer` as far as the data go.
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let read = match self {
                Self::Plain(blob) => blob.read(&mut buffer[filled..]),
                Self::Gzip(decoder) => decoder.read(&mut buffer[filled..]),
                Self::Zstd(decoder) => decoder.read(&mut buffer[filled..]),
            };
            match read {
                Ok(0) => break,
                Ok(length) => filled += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }
}

/// What the inflating thread does: checks the blob's digest, and sends on what is in it.
fn inflate(
    blob: BlobReader,
    chunks: &SyncSender<Chunk>,
    expected: Option<&Digest>,
    limits: &Limits,
) -> Result<(), LayerError> {
    let mut inflater = Inflater::new(blob).map_err(|_| LayerError::Cancelled)?;
    let mut bytes = 0u64;
    loop {
        let mut chunk = vec![0; CHUNK];
        let length = inflater.fill(&mut chunk).map_err(|source| match inflater.blob().cancelled {
            true => LayerError::Cancelled,
            false => LayerError::Decompress { bytes, source },
        })?;
        if length == 0 {
            break;
        }
        bytes += length as u64;
        check_size(bytes, inflater.blob().count, limits)?;
        chunk.truncate(length);
        chunks.send(Chunk::Data(chunk)).map_err(|_| LayerError::Cancelled)?;
    }
    let mut blob = inflater.into_blob();
    // Nothing is expected after the compressed data, but it would be part of the blob.
    while !blob.fill_buf().map_err(|_| LayerError::Cancelled)?.is_empty() {
        blob.current.clear();
    }
    check_digest(expected, blob.hasher, |expected, actual| LayerError::BlobDigest { expected, actual })?;
    chunks.send(Chunk::End).map_err(|_| LayerError::Cancelled)
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

/// Inflates a blob that comes in `pieces`, for the fuzzer. Gives the bytes that came out.
#[cfg(feature = "fuzzing")]
pub(crate) fn inflate_pieces(pieces: Vec<Bytes>, limits: &Limits) -> Result<u64, LayerError> {
    let (sender, blob) = mpsc::channel(pieces.len() + 1);
    for message in pieces.into_iter().map(Message::Data).chain([Message::End]) {
        sender.try_send(message).unwrap_or_else(|_| unreachable!("there is room for all"));
    }
    // Room for all that is within the limit.
    let (chunk_sender, chunks) = sync_channel(limits.max_layer_bytes as usize / CHUNK + 2);
    inflate(BlobReader::new(blob, None), &chunk_sender, None, limits)?;
    Ok(chunks.try_iter().map(|chunk| if let Chunk::Data(data) = chunk { data.len() as u64 } else { 0 }).sum())
}

/// Holds what came out so far against the limits.
fn check_size(inflated: u64, compressed: u64, limits: &Limits) -> Result<(), LayerError> {
    if inflated > limits.max_layer_bytes {
        return Err(LayerError::Limit { what: "bytes after decompression", limit: limits.max_layer_bytes });
    }
    if inflated > RATIO_FREE && inflated / limits.max_inflate_ratio.max(1) > compressed {
        return Err(LayerError::Limit { what: "times its compressed size", limit: limits.max_inflate_ratio });
    }
    Ok(())
}

enum Chunk {
    Data(Vec<u8>),
    End,
}

/// The tar stream, as it comes out of the inflating thread.
struct ChunkReader {
    chunks: Receiver<Chunk>,
    chunk: Vec<u8>,
    position: usize,
    hasher: Sha256,
    count: u64,
    ended: bool,
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.position == self.chunk.len() && !self.ended {
            match self.chunks.recv() {
                Ok(Chunk::Data(chunk)) => {
                    self.hasher.update(&chunk);
                    self.count += chunk.len() as u64;
                    (self.chunk, self.position) = (chunk, 0);
                }
                Ok(Chunk::End) => self.ended = true,
                Err(_) => return Err(io::Error::other("the layer's other thread has stopped")),
            }
        }
        let rest = &self.chunk[self.position..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.position += length;
        Ok(length)
    }
}

impl ChunkReader {
    /// Checks the whole stream's digest, and gives it and the stream's length. The first half of it is the file system's
    /// UUID: layers differ in it.
    fn check(self, expected: Option<&Digest>) -> Result<([u8; 16], Digest, u64), LayerError> {
        let digest = check_digest(expected, self.hasher, |expected, actual| LayerError::DiffId { expected, actual })?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&digest[..16]);
        Ok((uuid, Digest::from_bytes(&digest), self.count))
    }
}
