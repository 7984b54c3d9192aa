//! A SPDY client for tests: it sends real bytes and collects what comes back.

use std::collections::HashMap;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{Decoder, Frame, put_data, put_ping, put_syn_stream};
use super::headers::{Compressor, Decompressor};

/// The client's side of a connection.
pub struct Client<S> {
    /// The connection.
    pub io: S,
    compressor: Compressor,
    decompressor: Decompressor,
    decoder: Decoder,
    /// What came on each stream, and whether it has ended.
    pub streams: HashMap<u32, (Vec<u8>, bool)>,
    /// SYN_REPLYs.
    pub replies: usize,
    /// Pings that came back.
    pub pings: Vec<u32>,
    /// Streams that were reset.
    pub resets: Vec<u32>,
    /// The connection has ended.
    pub closed: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// A client on `io`.
    pub fn new(io: S) -> Self {
        Self {
            io,
            compressor: Compressor::default(),
            decompressor: Decompressor::default(),
            decoder: Decoder::default(),
            streams: HashMap::new(),
            replies: 0,
            pings: Vec::new(),
            resets: Vec::new(),
            closed: false,
        }
    }

    async fn send(&mut self, bytes: BytesMut) {
        // The server may have closed, which is what a test then looks at.
        let _ = self.io.write_all(&bytes).await;
    }

    /// Opens a stream.
    pub async fn open(&mut self, id: u32, headers: &[(&str, &str)]) {
        let mut bytes = BytesMut::new();
        put_syn_stream(&mut bytes, id, &self.compressor.write(headers));
        self.send(bytes).await;
    }

    /// Sends data.
    pub async fn data(&mut self, id: u32, data: &[u8], fin: bool) {
        let mut bytes = BytesMut::new();
        put_data(&mut bytes, id, data, fin);
        self.send(bytes).await;
    }

    /// Sends a ping.
    pub async fn ping(&mut self, id: u32) {
        let mut bytes = BytesMut::new();
        put_ping(&mut bytes, id);
        self.send(bytes).await;
    }

    /// Reads until `condition` holds or the connection ends.
    pub async fn until(&mut self, condition: impl Fn(&Self) -> bool) {
        while !self.closed && !condition(self) {
            let mut buffer = vec![0; 64 * 1024];
            let read = tokio::time::timeout(Duration::from_secs(20), self.io.read(&mut buffer));
            let count = read.await.expect("in time").unwrap_or(0);
            self.closed = count == 0;
            self.decoder.push(&buffer[..count]);
            while let Some(frame) = self.decoder.next().expect("frames") {
                self.take(frame);
            }
        }
    }

    fn take(&mut self, frame: Frame) {
        match frame {
            Frame::OtherHeaders { block } => {
                let headers = self.decompressor.read(&block);
                headers.expect("headers");
                self.replies += 1;
            }
            Frame::Data { id, bytes, fin } => {
                let stream = self.streams.entry(id).or_default();
                stream.0.extend_from_slice(&bytes);
                stream.1 |= fin;
            }
            Frame::Ping { id } => self.pings.push(id),
            Frame::Reset { id } => self.resets.push(id),
            Frame::SynStream { .. } | Frame::GoAway | Frame::Ignored => {}
        }
    }

    /// What has come on a stream.
    pub fn received(&self, id: u32) -> &[u8] {
        self.streams.get(&id).map(|(bytes, _)| bytes.as_slice()).unwrap_or_default()
    }

    /// Whether a stream has ended.
    pub fn ended(&self, id: u32) -> bool {
        self.streams.get(&id).is_some_and(|(_, ended)| *ended)
    }
}
