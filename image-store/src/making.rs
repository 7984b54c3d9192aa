//! Makes the layers of an image, wherever their bytes come from, and then the image known.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::mpsc;

use crate::digest::{Digest, ImageId};
use crate::layer::{BlobSender, LayerError, LayerJob, is_disk_full, start};
use crate::spool::Spool;
use crate::store::{Inner, Pin, StoreError, StoredConfig};

/// How long the threads of layers that are given up may take to notice.
const GIVE_UP: Duration = Duration::from_secs(10);

/// What the threads that make a layer hold as long as they are at it: the pin, and a sign that they are busy.
type Keep = (Arc<Pin>, mpsc::Sender<()>);

/// An image to be made.
pub(crate) struct NewImage {
    pub id: ImageId,
    pub config: StoredConfig,
    /// In full.
    pub names: Vec<String>,
    /// Bottom first.
    pub layers: Vec<NewLayer>,
}

/// A layer to be made.
#[derive(Clone)]
pub(crate) struct NewLayer {
    /// What it is called in messages.
    pub name: String,
    /// The digest that its bytes must have, if one is known.
    pub blob: Option<Digest>,
    /// Bytes.
    pub size: u64,
    /// The digest of its tar.
    pub diff_id: Digest,
    /// Whether its bytes are kept while they arrive, for a pull that is cut.
    pub spooled: bool,
}

/// Why an image cannot be made.
pub(crate) enum MakeError<E> {
    /// A layer's bytes could not be had.
    Source(NewLayer, E),
    /// A layer is not acceptable, or cannot be written.
    Layer(NewLayer, LayerError),
    /// The store failed.
    Store(StoreError),
    /// A thread died.
    Died,
}

/// Makes an image. `feed` sends a layer's bytes, and ends the sender when they are complete; it is not called for layers that
/// are here already. `done` is told of each layer. When it fails, what was half made is gone.
pub(crate) async fn make_image<E, F, Fut>(
    store: &Arc<Inner>,
    image: NewImage,
    feed: F,
    done: impl Fn() + Sync,
) -> Result<(), MakeError<E>>
where
    F: Fn(NewLayer, BlobSender) -> Fut,
    Fut: Future<Output = Result<(), E>>,
{
    let diff_ids: Vec<Digest> = image.layers.iter().map(|layer| layer.diff_id.clone()).collect();
    // Every layer in it stays until the image is known. The threads that make layers hold it too.
    let pin = Arc::new(store.pin(&diff_ids));
    let (busy, mut idle) = mpsc::channel::<()>(1);
    // Collected, as a stream that holds the closure is not provably Send (rust-lang/rust#64552).
    let layers: Vec<_> = image
        .layers
        .into_iter()
        .map(|layer| {
            let made = make_layer(store, layer, (pin.clone(), busy.clone()), &feed);
            async { made.await.inspect(|()| done()) }
        })
        .collect();
    drop(busy);
    let at_once = store.config.max_layers_at_once_per_pull;
    let made = stream::iter(layers).buffer_unordered(at_once).try_collect::<()>().await;
    if made.is_err() {
        // The first failure gives up the other layers. What their threads have written is gone when the pull has failed.
        let _ = tokio::time::timeout(GIVE_UP, idle.recv()).await;
    }
    made?;
    let store = store.clone();
    let added = tokio::task::spawn_blocking(move || {
        let added = store.add(&image.id, &diff_ids, image.config, &image.names);
        drop(pin);
        added
    });
    added.await.map_err(|_| MakeError::Died)?.map_err(MakeError::Store)
}

/// Makes a layer, unless it is here.
async fn make_layer<E, F, Fut>(store: &Arc<Inner>, layer: NewLayer, keep: Keep, feed: &F) -> Result<(), MakeError<E>>
where
    F: Fn(NewLayer, BlobSender) -> Fut,
    Fut: Future<Output = Result<(), E>>,
{
    let lock = store.making(&layer.diff_id);
    let guard = lock.lock_owned().await;
    if store.layer_path(&layer.diff_id).is_file() {
        return Ok(());
    }
    let limit = store.config.limits.max_layer_bytes;
    if layer.size > limit {
        return Err(MakeError::Layer(layer, LayerError::Limit { what: "bytes", limit }));
    }
    // After the lock: who waits for another pull's layer holds no permit that this layer might need.
    let permit = store.permits.clone().acquire_owned().await.map_err(|_| MakeError::Died)?;
    let keep = Arc::new((guard, permit, keep));
    let spool = |empty| {
        let blob = layer.blob.as_ref().filter(|_| layer.spooled)?;
        store.spools.open(&layer.diff_id, blob, layer.size, empty)
    };
    let first = spool(false);
    let kept = first.as_ref().map(Spool::kept);
    match make_once(store, &layer, first, keep.clone(), feed).await {
        Err(MakeError::Layer(layer, error)) if kept.is_some_and(|kept| may_be_the_spools(&error, kept)) => {
            tracing::warn!(layer = layer.name, %error, kept, "a layer is fetched anew");
            make_once(store, &layer, spool(true), keep, feed).await
        }
        made => made,
    }
}

/// Whether a layer may have failed for the sake of its spool alone, which had so many bytes before.
fn may_be_the_spools(error: &LayerError, kept: u64) -> bool {
    match error {
        LayerError::Write { source } => is_disk_full(source),
        LayerError::Input { .. } | LayerError::Cancelled | LayerError::Thread { .. } => false,
        LayerError::Decompress { .. }
        | LayerError::Tar { .. }
        | LayerError::Entry { .. }
        | LayerError::Limit { .. }
        | LayerError::BlobDigest { .. }
        | LayerError::DiffId { .. } => kept > 0,
    }
}

/// Makes a layer of what is in its spool and what `feed` sends. Until the threads are done, nobody else starts on this layer and
/// nobody removes it, and they count as at work: they hold `keep`.
async fn make_once<E, F, Fut, K>(
    store: &Arc<Inner>,
    layer: &NewLayer,
    spool: Option<Spool>,
    keep: K,
    feed: &F,
) -> Result<(), MakeError<E>>
where
    F: Fn(NewLayer, BlobSender) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    K: Send + 'static,
{
    let job = LayerJob {
        blob: layer.blob.clone(),
        diff_id: layer.diff_id.clone(),
        limits: store.config.limits.clone(),
        temporary: store.temporary_path(&layer.diff_id),
        target: store.layer_path(&layer.diff_id),
        spool,
        keep,
    };
    let (sink, result) = match start(job) {
        Ok(started) => started,
        Err(error) => return Err(MakeError::Layer(layer.clone(), error)),
    };
    if let Err(error) = feed(layer.clone(), sink).await {
        // The threads see that nothing more comes; their result would say no more. They are waited for, so that what they
        // wrote is gone when the pull has failed.
        let _ = result.await;
        return Err(MakeError::Source(layer.clone(), error));
    }
    let made = result.await.unwrap_or(Err(LayerError::Thread { problem: "died" }));
    made.map_err(|error| MakeError::Layer(layer.clone(), error))
}
