//! The tar of a layer, on its way from the thread that inflates it to the one that converts it.

use std::io::{self, Read};
use std::sync::mpsc::Receiver;

use sha2::{Digest as _, Sha256};

use super::check_digest;
use crate::digest::Digest;
use crate::layer::LayerError;

/// A piece of the tar.
pub(super) enum Chunk {
    Data(Vec<u8>),
    /// All of it has come, and the blob was what it should be.
    End,
}

/// The tar stream, as it comes out of the inflating thread.
pub(super) struct ChunkReader {
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
    pub(super) fn new(chunks: Receiver<Chunk>) -> Self {
        Self { chunks, chunk: Vec::new(), position: 0, hasher: Sha256::new(), count: 0, ended: false }
    }

    /// Checks the whole stream's digest, and gives it and the stream's length. The first half of it is the file system's
    /// UUID: layers differ in it.
    pub(super) fn check(self, expected: Option<&Digest>) -> Result<([u8; 16], Digest, u64), LayerError> {
        let digest = check_digest(expected, self.hasher, |expected, actual| LayerError::DiffId { expected, actual })?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&digest[..16]);
        Ok((uuid, Digest::from_bytes(&digest), self.count))
    }
}
