//! Pulls from a registry in this process that misbehaves as told.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use isopod_image_store::{Auth, DiskSegment, ImageDisk, ImageStore, PullError};
use isopod_proto::ErrorKind;
use isopod_proto::chain as shown;
use redb::ReadableTable;
use support::registry::{Access, Fault, Registry};
use support::{Item, digest, gzip, noise, tar};
use tempfile::TempDir;

const NAME: &str = "test.example/a:1";

fn layer(seed: u64) -> Vec<u8> {
    tar(&[Item::Dir("etc/"), Item::File("etc/noise", &noise(300_000, seed)), Item::Symlink("x", "etc/noise")])
}

async fn pull(store: &ImageStore) -> Result<String, PullError> {
    store.pull(NAME, &Auth::Anonymous).await.map(|id| id.to_string())
}

/// No image, no layer, nothing half made; threads that are still stopping are waited for.
fn assert_nothing_left(store: &ImageStore, root: &Path) {
    assert!(store.images().unwrap().is_empty());
    let files = || -> usize {
        ["layers", "images", "tmp"].iter().map(|name| std::fs::read_dir(root.join(name)).unwrap().count()).sum()
    };
    let start = Instant::now();
    while files() > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "files stay behind");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Pulls what must fail; gives the error, having checked its kind, that it has all the words, and that nothing is left.
async fn pull_fails(registry: &Registry, kind: ErrorKind, words: &[&str]) -> PullError {
    let root = TempDir::new().unwrap();
    let mut config = registry.config(root.path());
    config.pull_progress_timeout = Duration::from_millis(500);
    config.limits.max_layer_bytes = 100 << 20;
    let store = ImageStore::open(config).unwrap();
    let error = pull(&store).await.unwrap_err();
    let text = shown(&error);
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
    assert_nothing_left(&store, root.path());
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pulled_image_is_listed_found_and_removed() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    let (manifest, config, _) = registry.put_image("a", "1", &[layer(1), layer(2), layer(1)]);
    registry.put_image("a", "2", &[layer(1), layer(2), layer(1)]);
    assert_eq!(pull(&store).await.unwrap(), config);
    let id = store.pull("test.example/a:2", &Auth::Anonymous).await.unwrap();
    let image = store.find(NAME).unwrap().unwrap();
    assert_eq!((image.id.as_str(), &id), (config.as_str(), &image.id));
    assert_eq!(image.repo_tags, ["test.example/a:1", "test.example/a:2"]);
    assert_eq!(image.repo_digests, [format!("test.example/a@{manifest}")]);
    assert_eq!((image.layers, image.config.user.as_str()), (3, "1000:100"));
    assert_eq!(image.config.stop_signal, "SIGQUIT");
    assert!(image.size > 900_000 && image.config.exposed_ports.contains("80/tcp"));
    for reference in [&config, image.id.hex(), &image.id.hex()[..7], &format!("test.example/a@{manifest}")] {
        assert_eq!(store.find(reference).unwrap().as_ref(), Some(&image), "{reference}");
    }
    assert_eq!(store.find("test.example/b").unwrap(), None);
    assert_eq!(std::fs::read_dir(root.path().join("layers")).unwrap().count(), 2, "no layer is stored twice");
    assert!(store.usage().unwrap().used_bytes > 600_000);

    drop(store);
    let store = registry.store(root.path());
    assert_eq!(store.images().unwrap(), [image], "the store outlives its process");
    let disk = store.disk(&id).unwrap();
    store.remove("test.example/a:2").unwrap();
    store.remove("test.example/a:2").unwrap();
    assert_nothing_left(&store, root.path());
    let mut magic = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&disk.files[1], &mut magic, 1024).unwrap();
    assert_eq!(magic, 0xe0f5_e1e2u32.to_le_bytes(), "an open disk outlives its image");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_digest_gives_no_tag_and_removal_keeps_layers_of_others() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    let (manifest, ..) = registry.put_image("a", "1", &[layer(1), layer(2)]);
    registry.put_image("b", "1", &[layer(1), layer(3)]);
    let reference = format!("test.example/a:7@{manifest}");
    let id = store.pull(&reference, &Auth::Anonymous).await.unwrap();
    let image = store.find(&reference).unwrap().unwrap();
    assert_eq!((image.repo_tags.len(), image.repo_digests.len()), (0, 1));
    let other = store.pull("test.example/b:1", &Auth::Anonymous).await.unwrap();
    store.remove(id.as_str()).unwrap();
    assert_eq!(store.disk(&other).unwrap().files.len(), 3);
    assert_eq!(std::fs::read_dir(root.path().join("layers")).unwrap().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_leaves_its_old_image_without_it() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    registry.put_image("a", "1", &[layer(1)]);
    let old = store.pull(NAME, &Auth::Anonymous).await.unwrap();
    registry.put_image("a", "1", &[layer(2)]);
    let new = store.pull(NAME, &Auth::Anonymous).await.unwrap();
    assert_ne!(old, new);
    assert_eq!(store.find(NAME).unwrap().unwrap().id, new);
    let old = store.find(old.as_str()).unwrap().unwrap();
    assert_eq!((old.repo_tags.len(), old.repo_digests.len()), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_image_or_tag_is_not_found() {
    let registry = Registry::start().await;
    pull_fails(&registry, ErrorKind::NotFound, &["test.example/a:1"]).await;
    registry.put_image("a", "2", &[layer(1)]);
    pull_fails(&registry, ErrorKind::NotFound, &["test.example/a:1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_down_is_unavailable_in_the_kubelets_words() {
    let mut registry = Registry::start().await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    registry.address = free.local_addr().unwrap();
    drop(free);
    let error = pull_fails(&registry, ErrorKind::Unavailable, &["test.example/a:1", "refused"]).await;
    assert!(error.to_string().starts_with("RegistryUnavailable: "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_stops_sending_runs_into_the_progress_timeout() {
    let registry = Registry::start().await;
    let (_, _, layers) = registry.put_image("a", "1", &[layer(1)]);
    registry.fault(&layers[0], &[Fault::Hang(100_000)]);
    pull_fails(&registry, ErrorKind::DeadlineExceeded, &["test.example/a:1", "0.5 s"]).await;
    registry.fault("manifests/1", &[Fault::Hang(10)]);
    pull_fails(&registry, ErrorKind::DeadlineExceeded, &["test.example/a:1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_is_cut_goes_on_where_it_was() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    let (_, config, layers) = registry.put_image("a", "1", &[layer(1)]);
    registry.fault(&layers[0], &[Fault::Cut(100_000), Fault::Status(503), Fault::Cut(80_000), Fault::NoRange]);
    assert_eq!(pull(&store).await.unwrap(), config);
    let ranges: Vec<_> = registry.requests().into_iter().filter(|(path, ..)| path.ends_with(&layers[0])).collect();
    assert_eq!(ranges.len(), 4);
    assert!(ranges[1].1.is_some() && ranges[1].1 == ranges[2].1 && ranges[3].1 != ranges[2].1, "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_is_cut_for_good_is_unavailable() {
    let registry = Registry::start().await;
    let (_, _, layers) = registry.put_image("a", "1", &[layer(1)]);
    registry.fault(&layers[0], &[Fault::Cut(100_000), Fault::Cut(0)]);
    let error = pull_fails(&registry, ErrorKind::Unavailable, &["100000 of"]).await;
    assert!(error.to_string().starts_with("RegistryUnavailable: "));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_do_not_match_their_digest_are_corrupt() {
    let registry = Registry::start().await;
    let (manifest, config, layers) = registry.put_image("a", "1", &[layer(1)]);
    let mut other = gzip(&layer(2));
    other.resize(gzip(&layer(1)).len(), 0);
    registry.fault(&layers[0], &[Fault::Body(noise(other.len(), 3))]);
    pull_fails(&registry, ErrorKind::Corrupt, &[&layers[0]]).await;
    registry.fault(&config, &[Fault::Body(b"{}".to_vec())]);
    pull_fails(&registry, ErrorKind::Corrupt, &["configuration", &config, &digest(b"{}")]).await;

    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    registry.fault(&manifest, &[Fault::Body(b"{}".to_vec())]);
    let error = store.pull(&format!("test.example/a@{manifest}"), &Auth::Anonymous).await.unwrap_err();
    assert!(matches!(error, PullError::Digest { what: "manifest", .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_its_blob_or_not_its_diff_id_is_corrupt() {
    let registry = Registry::start().await;
    let (mine, other) = (gzip(&layer(1)), gzip(&layer(2)));
    let (_, _, layers) = registry.put_blobs("a", "1", std::slice::from_ref(&mine), &[digest(&layer(1))]);
    // The same length, and valid gzip of a valid tar: only the digest tells.
    let mut plain = layer(1);
    plain[1024 + 5] ^= 1;
    let forged = stored_gzip(&plain);
    registry.put_blobs("a", "1", &[stored_gzip(&layer(1))], &[digest(&layer(1))]);
    let honest = digest(&stored_gzip(&layer(1)));
    registry.fault(&honest, &[Fault::Body(forged)]);
    pull_fails(&registry, ErrorKind::Corrupt, &["blob has digest", &honest]).await;
    registry.put_blobs("a", "1", &[other], &[digest(&layer(1))]);
    pull_fails(&registry, ErrorKind::Corrupt, &["not the diff id", &digest(&layer(1))]).await;
    drop(layers);
}

/// gzip without compression, so that equal lengths stay equal.
fn stored_gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_gzip_is_named_so() {
    let registry = Registry::start().await;
    let blob = gzip(&layer(1));
    registry.put_blobs("a", "1", &[blob[..blob.len() / 2].to_vec()], &[digest(&layer(1))]);
    pull_fails(&registry, ErrorKind::Corrupt, &["truncated", &digest(&blob[..blob.len() / 2])]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_leave_the_tree_are_named() {
    let registry = Registry::start().await;
    for (item, words) in [
        (Item::File("a/../../etc/passwd", b"x"), ["a/../../etc/passwd", "\"..\""]),
        (Item::File("/etc/passwd", b"x"), ["/etc/passwd", "absolute"]),
        (Item::Link("link", "../../etc/passwd"), ["link", "../../etc/passwd"]),
        (Item::Link("link", "/etc/passwd"), ["link", "/etc/passwd"]),
        (Item::Link("link", "not/there"), ["not/there", "not in the layer"]),
        (Item::File("out/file", b"x"), ["out/file", "not a directory"]),
        (Item::File("..", b"x"), ["..", "\"..\""]),
    ] {
        registry.put_image("a", "1", &[tar(&[Item::Symlink("out", "../../.."), item])]);
        pull_fails(&registry, ErrorKind::Corrupt, &words).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_of_100_mb_is_refused_after_4() {
    let registry = Registry::start().await;
    registry.put_image("a", "1", &[layer(1)]);
    registry.fault("manifests/1", &[Fault::Body(vec![b' '; 100 << 20])]);
    pull_fails(&registry, ErrorKind::ResourceExhausted, &["manifest", "4194304"]).await;
    registry.fault("manifests/1", &[Fault::Endless]);
    pull_fails(&registry, ErrorKind::ResourceExhausted, &["manifest", "4194304"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_inflates_a_thousandfold_is_refused() {
    let registry = Registry::start().await;
    let bomb = tar(&[Item::File("zeros", &vec![0; 20 << 20])]);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut encoder, &bomb).unwrap();
    let blob = encoder.finish().unwrap();
    assert!(bomb.len() / blob.len() > 800);
    registry.put_blobs("a", "1", std::slice::from_ref(&blob), &[digest(&bomb)]);
    pull_fails(&registry, ErrorKind::ResourceExhausted, &["500", "compressed"]).await;

    let root = TempDir::new().unwrap();
    let mut config = registry.config(root.path());
    config.limits.max_layer_bytes = 1 << 20;
    let store = ImageStore::open(config).unwrap();
    let error = pull(&store).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert!(shown(&error).contains("1048576"), "{}", shown(&error));
    assert_nothing_left(&store, root.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_longer_than_its_manifest_says_is_refused() {
    let registry = Registry::start().await;
    let (_, _, layers) = registry.put_image("a", "1", &[layer(1)]);
    registry.fault(&layers[0], &[Fault::Endless]);
    pull_fails(&registry, ErrorKind::Corrupt, &[&layers[0], "longer"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_used_as_the_registry_asks_and_never_left_out() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    registry.put_image("a", "1", &[layer(1), layer(2)]);
    let right = Auth::Basic { username: "user".into(), password: "pass".into() };
    let wrong = Auth::Basic { username: "user".into(), password: "hunter2".into() };
    let header = "Basic dXNlcjpwYXNz".to_owned();
    for access in [Access::Basic(header.clone()), Access::Token(header)] {
        registry.demand(access);
        store.pull(NAME, &right).await.unwrap();
        store.remove(NAME).unwrap();
        for auth in [&wrong, &Auth::Anonymous, &Auth::RegistryToken("nonsense".into())] {
            let error = store.pull(NAME, auth).await.unwrap_err();
            assert!(matches!(error, PullError::Unauthorized { .. }), "{error}");
            assert!(!shown(&error).contains("hunter2"));
        }
    }
    store.pull(NAME, &Auth::RegistryToken("sesame".into())).await.unwrap();
    // Tokens for the taking: the flow without credentials.
    registry.demand(Access::Token(String::new()));
    store.pull(NAME, &Auth::Anonymous).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_another_host_gets_no_credentials() {
    let (registry, storage) = (Registry::start().await, Registry::start().await);
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    let (_, _, layers) = registry.put_image("a", "1", &[layer(1)]);
    registry.demand(Access::Basic("Basic dXNlcjpwYXNz".into()));
    storage.put("/blob", gzip(&layer(1)));
    registry.fault(&layers[0], &[Fault::Redirect(format!("{}/blob", storage.url()))]);
    let auth = Auth::Basic { username: "user".into(), password: "pass".into() };
    store.pull(NAME, &auth).await.unwrap();
    assert_eq!(storage.requests(), [("/blob".to_owned(), None, false)]);
    assert!(registry.requests().iter().any(|(path, _, authorized)| path.ends_with(&layers[0]) && *authorized));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_429_is_tried_again_and_a_403_is_not() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    let (_, config, _) = registry.put_image("a", "1", &[layer(1)]);
    registry.fault("manifests/1", &[Fault::TooMany, Fault::TooMany, Fault::NoRange]);
    assert_eq!(pull(&store).await.unwrap(), config);
    registry.fault("manifests/1", &[Fault::Status(403)]);
    let before = registry.requests().len();
    assert!(matches!(pull(&store).await, Err(PullError::Unauthorized { .. })));
    assert_eq!(registry.requests().len(), before + 1);
    registry.fault("manifests/1", &[Fault::TooMany]);
    assert_eq!(pull(&store).await.unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_mirror_answers_when_the_first_is_down() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let mut config = registry.config(root.path());
    let mirrors = config.registries.mirrors.get_mut("test.example").unwrap();
    mirrors.insert(0, isopod_image_store::Endpoint::new("http://127.0.0.1:1"));
    let store = ImageStore::open(config).unwrap();
    let (_, id, _) = registry.put_image("a", "1", &[layer(1)]);
    assert_eq!(pull(&store).await.unwrap(), id);
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_once_fetch_a_layer_once() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    let (_, _, layers) = registry.put_image("a", "1", &[layer(1), layer(2)]);
    registry.slow_down(Duration::from_millis(50));
    let pulls = (0..4).map(|_| pull(&store));
    for result in futures_util::future::join_all(pulls).await {
        result.unwrap();
    }
    for layer in layers {
        assert_eq!(registry.requests().iter().filter(|(path, ..)| path.ends_with(&layer)).count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_pulls_together_fetch_no_more_layers_at_once_than_configured() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let mut config = registry.config(root.path());
    config.max_layers_at_once = 4;
    let store = ImageStore::open(config).unwrap();
    let tars = |first: u64| (first..first + 4).map(layer).collect::<Vec<_>>();
    let (_, _, mut layers) = registry.put_image("a", "1", &tars(1));
    layers.extend(registry.put_image("b", "1", &tars(11)).2);
    registry.count(&layers);
    registry.slow_down(Duration::from_millis(100));
    let (a, b) = tokio::join!(pull(&store), store.pull("test.example/b:1", &Auth::Anonymous));
    a.unwrap();
    b.unwrap();
    // 3 of each pull without the limit.
    assert_eq!(registry.most_at_once(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_dropped_lets_the_layers_of_others_in() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let mut config = registry.config(root.path());
    config.max_layers_at_once = 1;
    let store = ImageStore::open(config).unwrap();
    let (_, _, layers) = registry.put_image("a", "1", &[layer(1), layer(2)]);
    registry.put_image("b", "1", &[layer(3), layer(4)]);
    registry.fault(&layers[0], &[Fault::Hang(100_000)]);
    registry.fault(&layers[1], &[Fault::Hang(100_000)]);
    let hanging = tokio::spawn({
        let store = store.clone();
        async move { pull(&store).await.map(drop) }
    });
    while !registry.requests().iter().any(|(path, ..)| layers.iter().any(|layer| path.ends_with(layer))) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let other = store.pull("test.example/b:1", &Auth::Anonymous);
    tokio::pin!(other);
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut other).await.is_err(), "the only permit is taken");
    hanging.abort();
    tokio::time::timeout(Duration::from_secs(10), other).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_dropped_leaves_nothing_and_blocks_nobody() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    let (_, config, layers) = registry.put_image("a", "1", &[layer(1), layer(2)]);
    registry.fault(&layers[0], &[Fault::Hang(100_000), Fault::NoRange]);
    let given_up = tokio::time::timeout(Duration::from_millis(300), pull(&store)).await;
    assert!(given_up.is_err());
    assert_nothing_left(&store, root.path());
    assert_eq!(pull(&store).await.unwrap(), config);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_run_left_is_cleaned_at_the_start() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    registry.put_image("a", "1", &[layer(1)]);
    registry.put_image("b", "1", &[layer(2)]);
    let kept = store.pull(NAME, &Auth::Anonymous).await.unwrap();
    let broken = store.pull("test.example/b:1", &Auth::Anonymous).await.unwrap();
    drop(store);
    for stray in ["tmp/half", "layers/0000.erofs", "images/1.erofs"] {
        std::fs::write(root.path().join(stray), b"x").unwrap();
    }
    let hex = digest(&layer(2)).replace("sha256:", "");
    std::fs::remove_file(root.path().join(format!("layers/{hex}.erofs"))).unwrap();
    let store = registry.store(root.path());
    assert_eq!(store.images().unwrap().len(), 1);
    assert!(store.disk(&kept).is_ok());
    assert_eq!(store.disk(&broken).unwrap_err().kind(), ErrorKind::NotFound);
    let count = |name: &str| std::fs::read_dir(root.path().join(name)).unwrap().count();
    assert_eq!((count("tmp"), count("layers"), count("images")), (0, 1, 1));
}

#[test]
fn a_store_is_opened_once_and_only_where_it_belongs() {
    let root = TempDir::new().unwrap();
    let config = isopod_image_store::StoreConfig::new(root.path());
    let store = ImageStore::open(config.clone()).unwrap();
    assert_eq!(ImageStore::open(config.clone()).err().unwrap().kind(), ErrorKind::FailedPrecondition);
    drop(store);
    std::fs::write(root.path().join("version"), "something else").unwrap();
    assert_eq!(ImageStore::open(config).err().unwrap().kind(), ErrorKind::FailedPrecondition);
    let mut config = isopod_image_store::StoreConfig::new(root.path());
    config.registries.mirrors.insert("x".into(), vec![isopod_image_store::Endpoint::new("ftp://y")]);
    config.registries.mirrors.insert("z".into(), Vec::new());
    let error = ImageStore::open(config).err().unwrap();
    assert!(error.to_string().contains("ftp://y") && error.to_string().contains("\"z\""), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_full_disk_is_told_and_leaves_nothing() {
    if !support::root() {
        return;
    }
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let path = root.path().to_str().unwrap();
    support::run("mount", &["-t", "tmpfs", "-o", "size=6m", "tmpfs", path]);
    let store = registry.store(root.path());
    let large = tar(&[Item::File("large", &noise(8 << 20, 1))]);
    registry.put_image("a", "1", &[layer(1), large]);
    let error = pull(&store).await.unwrap_err();
    let left = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| assert_nothing_left(&store, root.path())));
    registry.put_image("a", "1", &[layer(1)]);
    let after = pull(&store).await;
    drop(store);
    support::run("umount", &[path]);
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{}", shown(&error));
    assert!(shown(&error).contains("disk is full"), "{}", shown(&error));
    left.unwrap();
    after.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_one_disk_of_metadata_layers_and_hashes() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    registry.put_image("a", "1", &[layer(1), layer(2), layer(1)]);
    let id = store.pull(NAME, &Auth::Anonymous).await.unwrap();
    let mut disk = Vec::new();
    let ImageDisk { files, segments, verity } = store.disk(&id).unwrap();
    for DiskSegment { file, offset, length } in segments {
        let mut bytes = vec![0; length as usize];
        std::os::unix::fs::FileExt::read_exact_at(&files[file], &mut bytes, offset).unwrap();
        disk.extend(bytes);
    }
    support::verify(&disk, verity);
    let (_, tree) = support::layers::read_back(&disk);
    assert_eq!(tree[&b"etc/noise"[..]].0.kind, support::layers::Kind::File(noise(300_000, 1)));
}

/// Takes from the images' records what a former version did not have.
fn forget_hashes(database: &Path) {
    let images = redb::TableDefinition::<&str, &[u8]>::new("images");
    let transaction = redb::Database::open(database).unwrap().begin_write().unwrap();
    {
        let mut table = transaction.open_table(images).unwrap();
        let rows = table.iter().unwrap().map(Result::unwrap);
        let rows: Vec<_> = rows.map(|(id, record)| (id.value().to_owned(), record.value().to_vec())).collect();
        for (id, record) in rows {
            let mut record: serde_json::Value = serde_json::from_slice(&record).unwrap();
            assert!(record.as_object_mut().unwrap().remove("verity").is_some_and(|verity| verity.is_object()));
            table.insert(id.as_str(), serde_json::to_vec(&record).unwrap().as_slice()).unwrap();
        }
    }
    transaction.commit().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_layer_is_not_given_new_hashes_when_the_store_is_opened() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    registry.put_image("a", "1", &[layer(1)]);
    let id = store.pull(NAME, &Auth::Anonymous).await.unwrap();
    drop(store);
    let layer = std::fs::read_dir(root.path().join("layers")).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&layer).unwrap();
    std::fs::write(&layer, &bytes[..bytes.len() - 4096]).unwrap();
    let store = registry.store(root.path());
    assert_eq!(store.disk(&id).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(std::fs::metadata(&layer).unwrap().len(), bytes.len() as u64 - 4096);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_the_former_version_keeps_its_images() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    registry.put_image("a", "1", &[layer(1), layer(2)]);
    let id = store.pull(NAME, &Auth::Anonymous).await.unwrap();
    let (image, verity) = (store.find(NAME).unwrap(), store.disk(&id).unwrap().verity);
    drop(store);
    let path = |name: &str| root.path().join(name);
    std::fs::write(path("version"), "isopod image store, version 1\n").unwrap();
    forget_hashes(&path("metadata.redb"));
    let files = |name: &str| std::fs::read_dir(path(name)).unwrap().map(|entry| entry.unwrap().path());
    let metadata: Vec<_> = files("images").collect();
    let (merged, mut layers) = (std::fs::read(&metadata[0]).unwrap(), BTreeMap::new());
    std::fs::remove_file(&metadata[0]).unwrap();
    std::fs::write(metadata[0].with_extension("gpt"), "EFI PART").unwrap();
    for layer in files("layers") {
        // Without its hashes, and what pads it.
        let bytes = std::fs::read(&layer).unwrap();
        let data = &bytes[..bytes.len() / 129 * 128];
        let used = data.iter().rposition(|byte| *byte != 0).unwrap().next_multiple_of(4096);
        layers.insert(layer.clone(), bytes.clone());
        std::fs::write(&layer, &data[..used]).unwrap();
    }
    let store = registry.store(root.path());
    assert_eq!(store.find(NAME).unwrap(), image);
    assert_eq!(store.disk(&id).unwrap().verity, verity);
    assert_eq!(files("images").collect::<Vec<_>>(), metadata);
    assert!(std::fs::read(&metadata[0]).unwrap() == merged);
    assert!(files("layers").all(|layer| std::fs::read(&layer).unwrap() == layers[&layer]));
    assert_eq!(std::fs::read_to_string(path("version")).unwrap(), "isopod image store, version 2\n");
}
