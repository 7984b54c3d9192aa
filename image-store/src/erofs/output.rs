//! The file that is being written: buffered, and hashed on the way for dm-verity by a thread of its own.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use super::early_sync::EarlySync;
use super::format::{ALIGNMENT, BLOCK_SIZE};
use crate::verity;

/// What is written at once, and hashed at once; whole blocks.
const CHUNK: usize = 512 << 10;
/// Chunks that wait for the hashing thread.
const QUEUE: usize = 3;

/// A new file that is written from its start to its end.
pub(super) struct Output {
    file: File,
    chunk: Vec<u8>,
    /// Bytes written so far.
    position: u64,
    hasher: Hasher,
    sync: EarlySync,
}

/// A file that was written. Not all of it is synced.
pub(crate) struct Written {
    pub file: File,
    /// Bytes in it.
    pub bytes: u64,
    /// The hash of each of its blocks, up to the next multiple of [`ALIGNMENT`], which is its length.
    pub hashes: Vec<u8>,
}

impl Output {
    pub(super) fn new(file: File) -> io::Result<Self> {
        Ok(Self {
            file,
            chunk: Vec::with_capacity(CHUNK),
            position: 0,
            hasher: Hasher::start()?,
            sync: EarlySync::new(),
        })
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.chunk.len()));
            self.chunk.extend_from_slice(now);
            bytes = later;
            if self.chunk.len() == CHUNK {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes zeros up to `position`.
    pub(super) fn pad_to(&mut self, position: u64) -> io::Result<()> {
        let zeros = [0; BLOCK_SIZE];
        while self.position < position {
            let length = (position - self.position).min(BLOCK_SIZE as u64);
            self.write(&zeros[..length as usize])?;
        }
        Ok(())
    }

    /// Writes zeros up to the end of the block.
    pub(super) fn end_block(&mut self) -> io::Result<()> {
        self.pad_to(self.position.next_multiple_of(BLOCK_SIZE as u64))
    }

    /// Ends the file, whose first block was written as zeros and becomes `first`.
    pub(super) fn finish(mut self, first: &[u8; BLOCK_SIZE]) -> io::Result<Written> {
        self.end_block()?;
        self.flush()?;
        self.file.write_all_at(first, 0)?;
        let length = self.position.next_multiple_of(ALIGNMENT);
        self.file.set_len(length)?;
        self.sync.finish()?;
        let mut hashes = self.hasher.finish()?;
        let first = verity::hash(first);
        hashes[..first.len()].copy_from_slice(&first);
        let zeros = verity::hash(&[0; BLOCK_SIZE]);
        while (hashes.len() / zeros.len()) as u64 * (BLOCK_SIZE as u64) < length {
            hashes.extend_from_slice(&zeros);
        }
        Ok(Written { file: self.file, bytes: self.position, hashes })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.chunk)?;
        self.sync.written(&self.file, self.position)?;
        let next = self.hasher.spare.try_recv().unwrap_or_else(|_| Vec::with_capacity(CHUNK));
        self.hasher.hash(std::mem::replace(&mut self.chunk, next))
    }
}

/// The thread that hashes. It ends with its owner.
struct Hasher {
    chunks: Option<SyncSender<Vec<u8>>>,
    /// Chunks that were hashed, emptied.
    spare: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<Vec<u8>>>,
}

impl Hasher {
    fn start() -> io::Result<Self> {
        let (sender, chunks) = sync_channel::<Vec<u8>>(QUEUE);
        let (spare_sender, spare) = sync_channel(QUEUE + 2);
        let body = move || {
            let mut hashes = Vec::new();
            for mut chunk in chunks {
                verity::hash_blocks(&chunk, &mut hashes);
                chunk.clear();
                // One too many is freed.
                let _ = spare_sender.try_send(chunk);
            }
            hashes
        };
        let thread = thread::Builder::new().name("layer-hash".into()).spawn(body)?;
        Ok(Self { chunks: Some(sender), spare, thread: Some(thread) })
    }

    fn hash(&self, chunk: Vec<u8>) -> io::Result<()> {
        let sent = self.chunks.as_ref().map(|chunks| chunks.send(chunk));
        sent.is_some_and(|sent| sent.is_ok()).then_some(()).ok_or_else(died)
    }

    fn finish(&mut self) -> io::Result<Vec<u8>> {
        self.chunks = None;
        self.thread.take().and_then(|thread| thread.join().ok()).ok_or_else(died)
    }
}

impl Drop for Hasher {
    fn drop(&mut self) {
        // Whoever drops it unfinished has an error of its own.
        let _ = self.finish();
    }
}

fn died() -> io::Error {
    io::Error::other("the hashing thread died")
}
