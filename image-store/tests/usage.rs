//! What the store says that it takes is what `du` finds.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use isopod_image_store::{Auth, ImageStore};
use support::registry::{Fault, Registry};
use support::{Item, noise, tar};
use tempfile::TempDir;

/// What the file system may have changed between two looks: it allocates as it writes back. Bytes.
const TOLERANCE: u64 = 64 << 10;

fn layer(seed: u64) -> Vec<u8> {
    let small: Vec<(String, Vec<u8>)> =
        (0..50).map(|index| (format!("etc/{index}"), noise(100 * index, seed))).collect();
    let large = noise(1_500_000, seed);
    let mut items = vec![Item::Dir("etc/"), Item::File("large", &large)];
    items.extend(small.iter().map(|(name, data)| Item::File(name, data)));
    tar(&items)
}

/// Bytes and inodes of everything in `directory`, itself included, as `du` counts them: a file with many names once.
fn walk(directory: &Path, seen: &mut BTreeSet<u64>) -> (u64, u64) {
    let metadata = std::fs::symlink_metadata(directory).unwrap();
    if !seen.insert(metadata.ino()) {
        return (0, 0);
    }
    let (mut bytes, mut inodes) = (metadata.blocks() * 512, 1);
    if metadata.is_dir() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let (more, files) = walk(&entry.unwrap().path(), seen);
            (bytes, inodes) = (bytes + more, inodes + files);
        }
    }
    (bytes, inodes)
}

/// Holds the store's word against a walk, and gives the bytes.
fn agrees(store: &ImageStore, root: &Path, when: &str) -> u64 {
    let usage = store.usage().unwrap();
    let (bytes, inodes) = walk(root, &mut BTreeSet::new());
    assert_eq!(usage.inodes_used, inodes, "inodes {when}");
    assert!(usage.used_bytes.abs_diff(bytes) <= TOLERANCE, "{when}: {} bytes, and du finds {bytes}", usage.used_bytes);
    bytes
}

/// Opens the store as soon as the threads of the pull that was cut have let go of it.
async fn reopen(registry: &Registry, root: &Path) -> ImageStore {
    for _ in 0..1000 {
        if let Ok(store) = ImageStore::open(registry.config(root)) {
            return store;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it stays in use");
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_what_du_finds_whatever_was_pulled_shared_cut_and_removed() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let path = root.path();
    let store = registry.store(path);
    agrees(&store, path, "of an empty store");
    registry.put_image("a", "1", &[layer(1), layer(2)]);
    registry.put_image("b", "1", &[layer(1), layer(3)]);
    store.pull("test.example/a:1", &Auth::Anonymous).await.unwrap();
    let one = agrees(&store, path, "with an image");
    store.pull("test.example/b:1", &Auth::Anonymous).await.unwrap();
    let two = agrees(&store, path, "with one that shares a layer");
    assert!((1_500_000..3_000_000).contains(&(two - one)), "one layer more is {} bytes", two - one);

    // A pull that was cut has left something, and one that runs has begun something.
    let (_, _, layers) = registry.put_image("c", "1", &[layer(4)]);
    registry.fault(&layers[0], &[Fault::Hang(1_200_000)]);
    let pull = store.pull("test.example/c:1", &Auth::Anonymous);
    assert!(tokio::time::timeout(Duration::from_millis(700), pull).await.is_err());
    while std::fs::read_dir(path.join("tmp")).unwrap().next().is_some() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let cut = agrees(&store, path, "with a pull that was cut");
    assert!(cut - two > 1_000_000, "what it left is {} bytes", cut - two);

    let disk = store.disk(&store.find("test.example/a:1").unwrap().unwrap().id).unwrap();
    store.remove("test.example/a:1").unwrap();
    let left = agrees(&store, path, "after a removal");
    assert!(cut - left > 1_500_000 && disk.files.len() == 3);
    drop(store);
    let store = reopen(&registry, path).await;
    agrees(&store, path, "of a store that was opened again");
    store.remove("test.example/b:1").unwrap();
    let empty = agrees(&store, path, "of a store without images");
    assert!(left - empty > 3_000_000);
}
