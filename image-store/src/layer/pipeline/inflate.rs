//! What the thread "layer-inflate" does: from a blob to the tar in it, within the limits.

use std::io::{self, Read};
use std::sync::mpsc::SyncSender;

use super::blob::BlobReader;
use super::chunks::Chunk;
use super::{CHUNK, check_digest};
use crate::config::Limits;
use crate::digest::Digest;
use crate::layer::LayerError;

/// Layers below this size may be of any ratio.
const RATIO_FREE: u64 = 16 << 20;

/// A blob's bytes, decompressed. What it is compressed with is told by its first bytes, as media types are often wrong.
enum Inflater {
    Plain(BlobReader),
    Gzip(Box<flate2::bufread::MultiGzDecoder<BlobReader>>),
    Zstd(zstd::stream::read::Decoder<'static, BlobReader>),
}

impl Inflater {
    fn new(mut blob: BlobReader) -> io::Result<Self> {
        Ok(match blob.peek(4)? {
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
pub(super) fn inflate(
    blob: BlobReader,
    chunks: &SyncSender<Chunk>,
    expected: Option<&Digest>,
    limits: &Limits,
) -> Result<(), LayerError> {
    let mut inflater = Inflater::new(blob).map_err(|_| LayerError::Cancelled)?;
    let mut bytes = 0u64;
    loop {
        let mut chunk = vec![0; CHUNK];
        let length = inflater.fill(&mut chunk).map_err(|source| match inflater.blob().is_cancelled() {
            true => LayerError::Cancelled,
            false => LayerError::Decompress { bytes, source },
        })?;
        if length == 0 {
            break;
        }
        bytes += length as u64;
        check_size(bytes, inflater.blob().count(), limits)?;
        chunk.truncate(length);
        chunks.send(Chunk::Data(chunk)).map_err(|_| LayerError::Cancelled)?;
    }
    // Nothing is expected after the compressed data, but it would be part of the blob.
    let hasher = inflater.into_blob().finish().map_err(|_| LayerError::Cancelled)?;
    check_digest(expected, hasher, |expected, actual| LayerError::BlobDigest { expected, actual })?;
    chunks.send(Chunk::End).map_err(|_| LayerError::Cancelled)
}

/// Inflates a blob that comes in `pieces`, for the fuzzer. Gives the bytes that came out.
#[cfg(feature = "fuzzing")]
pub(crate) fn inflate_pieces(pieces: Vec<bytes::Bytes>, limits: &Limits) -> Result<u64, LayerError> {
    let (sender, blob) = tokio::sync::mpsc::channel(pieces.len() + 1);
    for message in pieces.into_iter().map(super::Message::Data).chain([super::Message::End]) {
        sender.try_send(message).unwrap_or_else(|_| unreachable!("there is room for all"));
    }
    // Room for all that is within the limit.
    let (chunk_sender, chunks) = std::sync::mpsc::sync_channel(limits.max_layer_bytes as usize / CHUNK + 2);
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
