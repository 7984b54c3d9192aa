//! The compressed bytes of a layer, as a reader: hashed, and kept for a pull that goes on after this one is cut.

use std::io::{self, BufRead, Read};

use bytes::{Buf, Bytes};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::Message;
use crate::spool::{Place, Spool};

/// The compressed bytes: those that were kept, and then as they come.
pub(super) struct BlobReader {
    blob: mpsc::Receiver<Message>,
    spool: Option<Spool>,
    current: Bytes,
    hasher: Sha256,
    count: u64,
    ended: bool,
    cancelled: bool,
}

impl BlobReader {
    pub(super) fn new(blob: mpsc::Receiver<Message>, spool: Option<Spool>) -> Self {
        Self { blob, spool, current: Bytes::new(), hasher: Sha256::new(), count: 0, ended: false, cancelled: false }
    }

    /// Where the bytes are kept, if they are.
    pub(super) fn spooled(&self) -> Option<Place> {
        self.spool.as_ref().map(Spool::place)
    }

    /// Bytes that have come so far.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether reading failed because no more will come.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    /// The bytes that come next, which stay: at least `least` unless there are fewer.
    pub(super) fn peek(&mut self, least: usize) -> io::Result<&[u8]> {
        self.fill_buf()?;
        // They are in one piece unless the network is odd; they are put together then.
        while self.current.len() < least && !self.ended {
            let mut start = std::mem::take(&mut self.current).to_vec();
            start.extend_from_slice(self.fill_buf()?);
            self.current = start.into();
        }
        Ok(&self.current)
    }

    /// Reads what is left, and gives what all bytes were hashed with.
    pub(super) fn finish(mut self) -> io::Result<Sha256> {
        while !self.fill_buf()?.is_empty() {
            self.current.clear();
        }
        Ok(self.hasher)
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
