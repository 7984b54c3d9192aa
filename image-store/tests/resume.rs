//! Pulls that were cut go on where they were, and believe nothing of what they find.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use isopod_image_store::{Auth, ImageStore, Limits, ResumeConfig, convert_blob};
use support::registry::{Fault, Registry};
use support::{Item, digest, noise, tar};
use tempfile::TempDir;

const NAME: &str = "test.example/a:1";
const KILLED: &str = "a_pull_whose_process_is_killed_goes_on_where_it_was";
/// Of its 3 MB, so many arrive before the pull is cut.
const ARRIVED: usize = 2_000_000;

fn layer() -> Vec<u8> {
    tar(&[Item::Dir("etc/"), Item::File("etc/noise", &noise(3_000_000, 1))])
}

fn spools(root: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(root.join("ingest")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Bytes in the only spool, if there is one.
fn spooled(root: &Path) -> usize {
    match spools(root).as_slice() {
        [] => 0,
        [spool] => std::fs::metadata(spool).map_or(0, |metadata| metadata.len() as usize),
        more => panic!("{more:?}"),
    }
}

/// A registry that has the image, whose layer has this digest.
async fn registry() -> (Registry, String, usize) {
    let registry = Registry::start().await;
    let (_, _, layers) = registry.put_image("a", "1", &[layer()]);
    (registry, layers[0].clone(), support::gzip(&layer()).len())
}

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "not yet: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Pulls until so many bytes have arrived, drops the pull, and gives the closed store's directory.
async fn cut(registry: &Registry, blob: &str, root: &Path) {
    registry.fault(blob, &[Fault::Hang(ARRIVED)]);
    let store = registry.store(root);
    let pull = tokio::spawn({
        let store = store.clone();
        async move { store.pull(NAME, &Auth::Anonymous).await.map(drop) }
    });
    wait_for("the first bytes", || spooled(root) >= ARRIVED).await;
    pull.abort();
    assert!(pull.await.unwrap_err().is_cancelled());
    drop(store);
    wait_for("the end of the pull's threads", || ImageStore::open(registry.config(root)).is_ok()).await;
    assert_eq!(spooled(root), ARRIVED);
    registry.fault(blob, &[]);
}

/// The image is there, its layer is byte for byte what it must be, and nothing is left of the pull.
fn check(store: &ImageStore, root: &Path) {
    assert!(store.find(NAME).unwrap().is_some());
    let work = TempDir::new().unwrap();
    let path = work.path().join("layer");
    convert_blob(layer().as_slice(), &path, &Limits::default()).unwrap();
    let file = root.join("layers").join(format!("{}.erofs", digest(&layer()).trim_start_matches("sha256:")));
    assert!(std::fs::read(file).unwrap() == std::fs::read(&path).unwrap());
    assert_eq!(spools(root), [] as [PathBuf; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_whose_process_is_killed_goes_on_where_it_was() {
    if let Ok(root) = std::env::var("RESUME_ROOT") {
        let mut registry = Registry::start().await;
        registry.address = std::env::var("RESUME_REGISTRY").unwrap().parse().unwrap();
        registry.store(Path::new(&root)).pull(NAME, &Auth::Anonymous).await.unwrap();
        return;
    }
    let (registry, blob, size) = registry().await;
    registry.fault(&blob, &[Fault::Hang(ARRIVED)]);
    let root = TempDir::new().unwrap();
    std::fs::create_dir(root.path().join("ingest")).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", KILLED])
        .env("RESUME_ROOT", root.path())
        .env("RESUME_REGISTRY", registry.address.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the first bytes", || spooled(root.path()) >= ARRIVED).await;
    child.kill().unwrap();
    child.wait().unwrap();
    registry.fault(&blob, &[]);
    let store = registry.store(root.path());
    assert_eq!(spooled(root.path()), ARRIVED, "what was there is there when the store is opened again");
    assert!(store.usage().unwrap().used_bytes > ARRIVED as u64);
    store.pull(NAME, &Auth::Anonymous).await.unwrap();
    check(&store, root.path());
    assert_eq!(registry.served(&blob), size, "no byte is fetched twice");
    let requests = registry.requests();
    assert_eq!(requests.last().unwrap().1.as_deref(), Some(format!("bytes={ARRIVED}-").as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_changed_on_disk_are_found_and_fetched_anew() {
    let (registry, blob, size) = registry().await;
    for (round, (place, bytes)) in [(1_000_000, 1), (0, 1), (500_000, 100_000)].into_iter().enumerate() {
        let root = TempDir::new().unwrap();
        cut(&registry, &blob, root.path()).await;
        let spool = spools(root.path()).remove(0);
        let mut content = std::fs::read(&spool).unwrap();
        content[place..place + bytes].iter_mut().for_each(|byte| *byte ^= 4);
        std::fs::write(&spool, &content).unwrap();
        let store = registry.store(root.path());
        store.pull(NAME, &Auth::Anonymous).await.unwrap();
        check(&store, root.path());
        // What was asked for behind the spool may have been sent, or not.
        let served = registry.served(&blob);
        let least = (round + 1) * (ARRIVED + size);
        assert!((least..=least + (round + 1) * (size - ARRIVED)).contains(&served), "{served} bytes of {size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_longer_than_its_layer_or_ends_early_is_no_hindrance() {
    let (registry, blob, size) = registry().await;
    for length in [size + 1, size, ARRIVED - 12_345, 1] {
        let root = TempDir::new().unwrap();
        cut(&registry, &blob, root.path()).await;
        // What was not written, as after a loss of power: zeros.
        std::fs::File::options().write(true).open(&spools(root.path())[0]).unwrap().set_len(length as u64).unwrap();
        let store = registry.store(root.path());
        store.pull(NAME, &Auth::Anonymous).await.unwrap();
        check(&store, root.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_ranges_is_read_from_the_start() {
    let (registry, blob, _) = registry().await;
    let root = TempDir::new().unwrap();
    cut(&registry, &blob, root.path()).await;
    registry.fault(&blob, &[Fault::NoRange]);
    let store = registry.store(root.path());
    store.pull(NAME, &Auth::Anonymous).await.unwrap();
    check(&store, root.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_wrong_is_refused_and_leaves_no_spool() {
    let (registry, blob, _) = registry().await;
    let root = TempDir::new().unwrap();
    let store = registry.store(root.path());
    let mut wrong = support::gzip(&layer());
    wrong[2_000_000] ^= 1;
    registry.fault(&blob, &[Fault::Body(wrong)]);
    store.pull(NAME, &Auth::Anonymous).await.unwrap_err();
    assert_eq!(spools(root.path()), [] as [PathBuf; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_goes_on_with_is_removed() {
    let (registry, blob, _) = registry().await;
    let root = TempDir::new().unwrap();
    cut(&registry, &blob, root.path()).await;
    let spool = spools(root.path()).remove(0);
    std::fs::write(root.path().join("ingest/stray"), b"x").unwrap();
    let other = root.path().join("ingest").join(format!("{0}.{0}", "1".repeat(64)));
    std::fs::write(&other, noise(1_000_000, 2)).unwrap();
    let aged = |path: &Path, age: u64| {
        let then = SystemTime::now() - Duration::from_secs(age);
        std::fs::File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
    };
    aged(&other, 3700);
    let store = registry.store(root.path());
    assert_eq!(spools(root.path()), std::slice::from_ref(&spool), "what is younger than an hour stays");
    // It is counted, and goes when it is too old.
    let before = store.usage().unwrap();
    aged(&spool, 3700);
    let after = store.usage().unwrap();
    assert_eq!(spools(root.path()), [] as [PathBuf; 0]);
    assert!(before.used_bytes - after.used_bytes >= ARRIVED as u64);
    drop(store);

    // The newest stay, as long as there is room for them.
    let mut config = registry.config(root.path());
    config.resume = ResumeConfig { max_bytes: 2_500_000, ..ResumeConfig::default() };
    for age in 1..4 {
        let path = root.path().join("ingest").join(format!("{0}.{0}", age.to_string().repeat(64)));
        std::fs::write(&path, noise(1_000_000, age)).unwrap();
        aged(&path, age);
    }
    let _store = ImageStore::open(config).unwrap();
    let mut left = spools(root.path());
    left.sort();
    assert_eq!(left.len(), 2);
    assert!(left[0].to_str().unwrap().ends_with("11") && left[1].to_str().unwrap().ends_with("22"));
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_disk_with_room_for_the_layer_alone_is_enough() {
    if !support::root() {
        return;
    }
    let (registry, blob, size) = registry().await;
    let root = TempDir::new().unwrap();
    let path = root.path().to_str().unwrap();
    // The database takes 1.5 MB, the layer 3.2 MB, and its compressed bytes as much once more.
    support::run("mount", &["-t", "tmpfs", "-o", "size=6500k", "tmpfs", path]);
    let store = registry.store(root.path());
    let pulled = store.pull(NAME, &Auth::Anonymous).await;
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        pulled.unwrap();
        check(&store, root.path());
    }));
    drop(store);
    support::run("umount", &[path]);
    result.unwrap();
    assert!(registry.served(&blob) <= 2 * size);
}
