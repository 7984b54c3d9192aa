//! The daemon from start to end.

use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use isopod_image_store::{Endpoint, ImageStore, PreloadError, Preloaded, StoreConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::check;
use crate::config::Config;
use crate::context::Context;
use crate::cri::MAX_MESSAGE;
use crate::cri::image_service_server::ImageServiceServer;
use crate::cri::runtime_service_server::RuntimeServiceServer;
use crate::grpc::{Images, Imports, Sandboxes};
use crate::images::images_server::ImagesServer;
use crate::index::Index;
use crate::network::Network;
use crate::runtime::Runtime;
use crate::sandbox::users::Users;
use crate::sandbox::{SandboxRecord, scratch};
use crate::socket;
use crate::store::Store;
use crate::streaming::Streaming;
use crate::volume::mirror::watch::Watches;

/// How long requests and streams in flight may take after the daemon is told to end.
const DRAIN: Duration = Duration::from_secs(20);
/// How long sandboxes may then take to finish what they are at. The daemon has ended after both, in time for an init that waits for it.
const FINISH: Duration = Duration::from_secs(5);

/// Runs the daemon until SIGTERM or SIGINT. Sandboxes live on.
pub async fn run(config: Config) -> anyhow::Result<()> {
    for finding in check::host(&config).iter().filter(|finding| finding.verdict != check::Verdict::Good) {
        tracing::warn!("{finding}");
    }
    for directory in [&config.root, &config.state, &config.state.join("sandboxes")] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        // Somebody else may have made it before, such as systemd.
        std::fs::set_permissions(directory, Permissions::from_mode(0o700))
            .with_context(|| format!("cannot protect {}", directory.display()))?;
    }
    let store = Store::open(&config.root.join("state.redb"))?;
    let stored = store.load()?;
    let images = ImageStore::open(image_config(&config))?;
    let network = Network::new(&config, store.clone());
    let (socket, group, streaming) = (config.socket.clone(), config.socket_group, config.streaming.clone());
    let preload = config.images.preload.clone();
    network.adopt(&stored.sandboxes.iter().map(SandboxRecord::known_pod).collect::<Vec<_>>()).await;
    prepare_node(&config, &network).await;
    let context = Context {
        users: Users::new(config.vmm.users),
        config,
        store,
        images: images.clone(),
        network,
        index: Index::default(),
        watches: Watches::start(),
    };
    let runtime = Runtime::new(Arc::new(context));
    runtime.resume(stored).await;
    let streaming = Streaming::start(&streaming, runtime.clone())
        .await
        .with_context(|| format!("cannot listen on {} for streams", streaming.address))?;

    // Last, as whoever finds the socket expects answers.
    let listener = socket::listen(&socket, group)?;
    let stopping = CancellationToken::new();
    let mut signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let server = Server::builder()
        .add_service(
            RuntimeServiceServer::new(Sandboxes::new(runtime.clone(), streaming.clone()))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            ImageServiceServer::new(Images::new(images.clone()))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(ImagesServer::new(Imports::new(images.clone())))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopping.clone().cancelled_owned());
    let server = tokio::spawn(server);
    let preload = preload.map(|directory| tokio::spawn(async move { preload_images(&images, &directory).await }));
    tracing::info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "isopod serves");
    // Without systemd there is nobody to notify.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    tokio::select! {
        _ = signals.0.recv() => {}
        _ = signals.1.recv() => {}
    }
    tracing::info!("isopod ends; its sandboxes live on");
    // As above.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stopping.cancel();
    if let Some(preload) = preload {
        preload.abort();
    }
    runtime.context().index.events().close();
    let _ = std::fs::remove_file(&socket); // A later daemon removes it as well.
    let (served, ()) = tokio::join!(tokio::time::timeout(DRAIN, server), streaming.stop(DRAIN));
    if served.is_err() {
        tracing::warn!("requests were cut off");
    }
    runtime.drain(FINISH).await;
    Ok(())
}

/// Makes what all pods share before the first one needs it. A failure is not the daemon's end: the first pod tries again, and its
/// error says what is wrong.
async fn prepare_node(config: &Config, network: &Network) {
    if let Err(error) = network.prepare().await {
        tracing::warn!(error = &error as &dyn std::error::Error, "the pod network cannot be made yet");
    }
    let (root, bytes) = (config.root.clone(), config.vmm.scratch_bytes);
    match tokio::task::spawn_blocking(move || scratch::prepare(&root, bytes)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "no scratch disk can be made yet"),
        Err(error) => tracing::warn!(%error, "no scratch disk can be made yet"),
    }
}

/// Imports the images of a directory, and says of each file what came of it.
async fn preload_images(images: &ImageStore, directory: &Path) {
    let told = |path: &Path, result: Result<Preloaded, PreloadError>| match result {
        Ok(Preloaded::Unchanged) => tracing::debug!(path = %path.display(), "preloaded before"),
        Ok(Preloaded::Imported(imported)) => {
            let names: Vec<&str> = imported.iter().flat_map(|image| &image.names).map(String::as_str).collect();
            tracing::info!(path = %path.display(), ?names, "images are preloaded");
        }
        Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "images are not preloaded"),
    };
    images.preload(directory, told).await;
}

/// The image store's part of the configuration.
pub(crate) fn image_config(config: &Config) -> StoreConfig {
    let mut store = StoreConfig::new(config.root.join("images"));
    store.registries.mirrors =
        config.images.mirrors.iter().map(|(host, url)| (host.clone(), vec![Endpoint::new(url)])).collect();
    store.registries.certs_directory = Some(config.images.certs_directory.clone());
    store.limits.max_layer_bytes = config.images.max_layer_bytes;
    store.max_layers_at_once_per_pull = config.images.concurrent_layers;
    store.max_layers_at_once = config.images.concurrent_layers_total;
    store.pull_progress_timeout = config.images.progress_timeout;
    store
}
