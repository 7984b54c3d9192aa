//! Streams of a process's bytes, as `proto/stream.proto` has them.

use std::io;

use isopod_proto::agent::{StreamKind, StreamOpen, StreamOpened};
use isopod_proto::{AGENT_STREAM_PORT, ErrorKind, MAX_STREAM_HEADER, encode_frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{Guest, GuestError, SHORT, connect, read_frame};

/// The output of a process: bytes to read, each of them to be acknowledged.
pub struct Output {
    stream: UnixStream,
    taken: u64,
}

/// The input of a process.
pub struct Input {
    stream: UnixStream,
}

impl Guest {
    /// Opens an output stream of `process` from byte `offset` on.
    pub async fn output(&self, process: &str, kind: StreamKind, offset: u64) -> Result<Output, GuestError> {
        let stream = self.open(process, kind, offset, 0).await?;
        Ok(Output { stream, taken: offset })
    }

    /// Opens the input stream of `process`.
    pub async fn input(&self, process: &str) -> Result<Input, GuestError> {
        Ok(Input { stream: self.open(process, StreamKind::Stdin, 0, 0).await? })
    }

    /// Connects to a TCP port on the pod's loopback.
    pub async fn tcp(&self, port: u16) -> Result<UnixStream, GuestError> {
        self.open("", StreamKind::Tcp, 0, port).await
    }

    async fn open(&self, process: &str, kind: StreamKind, offset: u64, port: u16) -> Result<UnixStream, GuestError> {
        let failed = |source| GuestError::Connection { doing: "open a stream of", socket: self.socket.clone(), source };
        let opening = async {
            let mut stream = connect(&self.socket, AGENT_STREAM_PORT).await?;
            let open = StreamOpen { process_id: process.to_owned(), kind: kind.into(), offset, port: port.into() };
            stream.write_all(&encode_frame(&open)).await.map_err(failed)?;
            let opened: StreamOpened = read_frame(&mut stream, &self.socket, MAX_STREAM_HEADER, "StreamOpened").await?;
            if opened.error.is_empty() {
                return Ok(stream);
            }
            Err(GuestError::Refused { call: "a stream", kind: ErrorKind::NotFound, message: opened.error })
        };
        let late = |_| GuestError::Deadline { call: "a stream", deadline: SHORT };
        timeout(SHORT, opening).await.map_err(late)?
    }
}

impl Output {
    /// Reads some bytes; 0 is the end of the stream.
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer).await
    }

    /// Says that `count` more bytes are taken for good, so that the guest may forget them.
    pub async fn acknowledge(&mut self, count: u64) -> io::Result<()> {
        self.taken += count;
        self.stream.write_all(&self.taken.to_le_bytes()).await
    }

    /// How many bytes of the whole stream are taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }
}

impl Input {
    /// Writes all of `bytes` to the process.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Ends the process's input.
    pub async fn finish(mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }
}
