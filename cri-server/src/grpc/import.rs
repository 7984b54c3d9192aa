//! The service for isopod's own command line: imports.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use futures_util::stream::{self, BoxStream, StreamExt};
use isopod_image_store::{ImageStore, Progress};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{observe, status};
use crate::images::images_server::Images;
use crate::images::import_event::Event;
use crate::images::{Contents, ImportEvent, ImportRequest, ImportedImage};

/// Messages of an archive that may wait for the disk.
const QUEUE: usize = 8;

/// Imports archives into the image store.
pub struct Imports {
    store: ImageStore,
}

impl Imports {
    /// The service over `store`.
    pub fn new(store: ImageStore) -> Self {
        Self { store }
    }
}

#[tonic::async_trait]
impl Images for Imports {
    type ImportStream = BoxStream<'static, Result<ImportEvent, Status>>;

    async fn import(&self, request: Request<Streaming<ImportRequest>>) -> Result<Response<Self::ImportStream>, Status> {
        let mut incoming = request.into_inner();
        let first = incoming.message().await?.ok_or_else(|| status::invalid("the archive has no bytes"))?;
        let (events, told) = mpsc::unbounded_channel();
        let store = self.store.clone();
        let work = async move {
            let (sender, chunks) = mpsc::channel(QUEUE);
            let name = Some(first.name.clone()).filter(|name| !name.is_empty());
            let archive = ArchiveReader { chunks, current: Bytes::new() };
            // Whoever listens no more has cancelled the import.
            let progress = |progress| drop(events.send(Ok(event(progress))));
            let import = store.import(archive, name.as_deref(), progress);
            tokio::select! {
                imported = import => imported.map(drop).map_err(|error| status::of(&error)),
                () = pass_on(first, incoming, sender) => Err(status::internal("nobody passes the archive on")),
            }
        };
        let work = stream::once(observe("Import", "an archive", work));
        // The import runs as its events are asked for, and ends with the stream.
        let failure = work.filter_map(|result| async { result.err().map(Err) });
        Ok(Response::new(stream::select(UnboundedReceiverStream::new(told), failure).boxed()))
    }
}

/// Passes the archive on to the thread that reads it; never ends, as the import does.
async fn pass_on(
    first: ImportRequest,
    mut incoming: Streaming<ImportRequest>,
    sender: mpsc::Sender<Result<Bytes, io::Error>>,
) {
    let mut next: Result<_, Status> = Ok(Some(first));
    loop {
        let (message, last) = match next {
            Ok(Some(message)) => (Ok(Bytes::from(message.data)), false),
            Ok(None) => break,
            Err(status) => (Err(io::Error::other(status.message().to_owned())), true),
        };
        if sender.send(message).await.is_err() || last {
            break;
        }
        next = incoming.message().await;
    }
    drop(sender);
    std::future::pending().await
}

fn event(progress: Progress) -> ImportEvent {
    let event = match progress {
        Progress::Read { images, layers } => Event::Contents(Contents { images: images as u64, layers: layers as u64 }),
        Progress::Layers(done) => Event::LayersDone(done as u64),
        Progress::Image(image) => Event::Image(ImportedImage { id: image.id.to_string(), names: image.names }),
    };
    ImportEvent { event: Some(event) }
}

/// The archive's bytes, for the thread that reads them.
struct ArchiveReader {
    chunks: mpsc::Receiver<Result<Bytes, io::Error>>,
    current: Bytes,
}

impl Read for ArchiveReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = chunk?,
                None => return Ok(0),
            }
        }
        let length = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
