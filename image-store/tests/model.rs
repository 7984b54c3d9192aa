//! Random pulls, cut pulls, removals and crashes against a model.
//!
//! A crash is the store's directory as it was somewhere in the operation, put together of what was there before it and what is after
//! it, by the order in which the store makes things durable. A pull syncs and renames each layer, then the metadata file, then commits
//! the database; a removal commits first and then unlinks. So with the old database all old files are there and any of the new ones,
//! the metadata file only if all its layers are; with the new one all new files and any of the old ones. What is never synced, `tmp`
//! and `ingest`, may hold anything. What torn writes within the database's file do is the
//! test of `src/store/database/tests.rs`.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use isopod_image_store::{Auth, ImageStore, Limits, convert_blob};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::registry::{Fault, Registry};
use support::{Item, digest, gzip, noise, tar};
use tempfile::TempDir;

const IMAGES: u64 = 4;
const LAYERS: u64 = 5;
const DATABASE: &str = "metadata.redb";

#[derive(Clone, Debug)]
enum Operation {
    Pull(u64),
    /// Given up when so many bytes of each layer have arrived.
    Cut(u64, usize),
    Remove(u64),
}

#[derive(Clone, Debug)]
struct Step {
    operation: Operation,
    /// Of a crash somewhere in it: a source of decisions.
    crash: Option<u64>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let operation = prop_oneof![
        4 => (0..IMAGES).prop_map(Operation::Pull),
        2 => (0..IMAGES, 0..20_000usize).prop_map(|(image, bytes)| Operation::Cut(image, bytes)),
        3 => (0..IMAGES).prop_map(Operation::Remove),
    ];
    let step = (operation, prop::option::of(any::<u64>())).prop_map(|(operation, crash)| Step { operation, crash });
    prop::collection::vec(step, 1..10)
}

fn layer(number: u64) -> Vec<u8> {
    tar(&[Item::Dir("etc/"), Item::File("etc/noise", &noise(15_000 + 1000 * number as usize, number))])
}

fn layers(image: u64) -> BTreeSet<u64> {
    (0..3).map(|index| (image + index * index) % LAYERS).collect()
}

fn name(image: u64) -> String {
    format!("test.example/image:{image}")
}

/// The files of a store, by their paths in it.
type Files = BTreeMap<String, Vec<u8>>;

fn read(root: &Path) -> Files {
    let mut files = Files::new();
    for directory in ["", "layers", "images", "ingest", "tmp"] {
        for entry in std::fs::read_dir(root.join(directory)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                let path = Path::new(directory).join(entry.file_name());
                // What is removed meanwhile is not there.
                if let Ok(content) = std::fs::read(entry.path()) {
                    files.insert(path.to_str().unwrap().to_owned(), content);
                }
            }
        }
    }
    files
}

fn write(root: &Path, files: &Files) {
    for directory in ["layers", "images", "ingest", "tmp"] {
        std::fs::remove_dir_all(root.join(directory)).unwrap();
        std::fs::create_dir(root.join(directory)).unwrap();
    }
    for (path, content) in files {
        std::fs::write(root.join(path), content).unwrap();
    }
}

/// Decisions, each from the one before.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn yes(&mut self) -> bool {
        self.below(2) == 1
    }

    /// What an unsynced file may be after a loss of power: shorter, or with blocks that were never written.
    fn torn(&mut self, content: &[u8]) -> Vec<u8> {
        let mut torn = content[..self.below(content.len() + 1)].to_vec();
        if self.yes() && !torn.is_empty() {
            let start = self.below(torn.len());
            let end = torn.len().min(start + 4096);
            torn[start..end].fill(0);
        }
        torn
    }
}

/// The store as a crash between `before` and `after` leaves it, and whether the operation is in its database.
fn crashed(before: &Files, after: &Files, seed: u64) -> (Files, bool) {
    let mut chance = Chance(seed);
    let committed = chance.yes();
    let mut files = Files::new();
    let database = if committed { after } else { before };
    for path in [DATABASE, "version"] {
        files.insert(path.to_owned(), database[path].clone());
    }
    let lasting = |path: &str| path.starts_with("layers/") || path.starts_with("images/");
    // What has to be there, and what may be.
    let (there, perhaps) = if committed { (after, before) } else { (before, after) };
    files.extend(there.iter().filter(|(path, _)| lasting(path)).map(|(path, content)| (path.clone(), content.clone())));
    let mut all_layers = true;
    // Layers first: their directory sorts behind that of the metadata files.
    for (path, content) in perhaps.iter().rev().filter(|(path, _)| lasting(path) && !there.contains_key(*path)) {
        let possible = committed || path.starts_with("layers/") || all_layers;
        if possible && chance.yes() {
            files.insert(path.clone(), content.clone());
        } else {
            all_layers = false;
            // It was being written.
            let half = Path::new("tmp").join(Path::new(path).file_stem().unwrap());
            files.insert(half.to_str().unwrap().to_owned(), chance.torn(content));
        }
    }
    for (path, content) in before.iter().chain(after).filter(|(path, _)| path.starts_with("ingest/")) {
        if chance.yes() {
            files.insert(path.clone(), chance.torn(content));
        }
    }
    (files, committed)
}

struct World {
    registry: Registry,
    /// Blob of each layer, and its file.
    blobs: Vec<String>,
    expected: Vec<(String, Vec<u8>)>,
}

impl World {
    async fn new() -> Self {
        let registry = Registry::start().await;
        let work = TempDir::new().unwrap();
        let (mut blobs, mut expected) = (Vec::new(), Vec::new());
        for number in 0..LAYERS {
            let path = work.path().join(number.to_string());
            let report = convert_blob(layer(number).as_slice(), &path, &Limits::default()).unwrap();
            blobs.push(digest(&gzip(&layer(number))));
            expected.push((format!("layers/{}.erofs", report.diff_id.hex()), std::fs::read(&path).unwrap()));
        }
        for image in 0..IMAGES {
            let tars: Vec<_> = layers(image).into_iter().map(layer).collect();
            registry.put_image("image", &image.to_string(), &tars);
        }
        Self { registry, blobs, expected }
    }

    /// Opens the store, waiting for the threads of pulls that were cut.
    async fn open(&self, root: &Path) -> ImageStore {
        let mut config = self.registry.config(root);
        config.resume.min_bytes = 0;
        for _ in 0..1000 {
            match ImageStore::open(config.clone()) {
                Err(isopod_image_store::OpenError::InUse { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
                opened => return opened.unwrap(),
            }
        }
        panic!("it stays in use");
    }

    async fn operate(&self, store: &ImageStore, root: &Path, operation: &Operation) {
        match operation {
            Operation::Pull(image) => drop(store.pull(&name(*image), &Auth::Anonymous).await.unwrap()),
            Operation::Remove(image) => store.remove(&name(*image)).unwrap(),
            Operation::Cut(image, bytes) => {
                self.blobs.iter().for_each(|blob| self.registry.fault(blob, &[Fault::Hang(*bytes)]));
                // Ends by itself if all its layers are here.
                let name = name(*image);
                let pulled = store.pull(&name, &Auth::Anonymous);
                let _ = tokio::time::timeout(Duration::from_millis(100), pulled).await;
                self.blobs.iter().for_each(|blob| self.registry.fault(blob, &[]));
                while std::fs::read_dir(root.join("tmp")).unwrap().next().is_some() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
    }

    /// Exactly the images that there must be, with exactly their files, byte for byte.
    fn check(&self, store: &ImageStore, root: &Path, model: &BTreeSet<u64>) {
        for image in 0..IMAGES {
            let found = store.find(&name(image)).unwrap();
            assert_eq!(found.is_some(), model.contains(&image), "image {image}");
            if let Some(found) = found {
                assert_eq!(store.disk(&found.id).unwrap().files.len(), 1 + layers(image).len());
            }
        }
        let files = read(root);
        let of = |directory: &str| files.keys().filter(|path| path.starts_with(directory)).collect::<BTreeSet<_>>();
        let wanted: BTreeSet<u64> = model.iter().flat_map(|image| layers(*image)).collect();
        let wanted: BTreeMap<&String, &Vec<u8>> = wanted
            .iter()
            .map(|number| &self.expected[*number as usize])
            .map(|(path, content)| (path, content))
            .collect();
        assert_eq!(of("layers/"), wanted.keys().copied().collect());
        assert!(wanted.into_iter().all(|(path, content)| files[path] == *content), "a layer is not what it must be");
        assert_eq!((of("images/").len(), of("tmp/").len()), (model.len(), 0));
        for spool in of("ingest/") {
            let diff_id = spool["ingest/".len()..].split('.').next().unwrap();
            let path = format!("layers/{diff_id}.erofs");
            assert!(self.expected.iter().any(|(known, _)| *known == path) && !files.contains_key(&path), "{spool}");
        }
    }

    /// A step, after which the model is of what is there.
    async fn step(&self, root: &Path, model: &mut BTreeSet<u64>, step: &Step) {
        let store = self.open(root).await;
        self.check(&store, root, model);
        let before = read(root);
        self.operate(&store, root, &step.operation).await;
        let (image, there) = match &step.operation {
            Operation::Pull(image) => (*image, true),
            Operation::Remove(image) => (*image, false),
            // It comes to its end if nothing of it was missing.
            Operation::Cut(image, _) => (*image, store.find(&name(*image)).unwrap().is_some()),
        };
        let mut done = model.clone();
        if there {
            done.insert(image)
        } else {
            done.remove(&image)
        };
        // As it is on disk while the process runs: nobody closes a database for a crash.
        let after = read(root);
        // Of a pull that was cut, threads may be at work still; the next step waits for them.
        if step.crash.is_none() && !matches!(step.operation, Operation::Cut(..)) {
            self.check(&store, root, &done);
        }
        drop(store);
        match step.crash {
            None => *model = done,
            Some(seed) => {
                drop(self.open(root).await);
                let (files, committed) = crashed(&before, &after, seed);
                write(root, &files);
                if committed {
                    *model = done;
                }
            }
        }
    }
}

#[test]
fn whatever_is_done_and_wherever_it_crashes_the_store_has_what_the_model_has() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let world = runtime.block_on(World::new());
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(16);
    let mut runner =
        TestRunner::new(Config { cases, max_shrink_iters: 50, failure_persistence: None, ..Config::default() });
    let result = runner.run(&steps(), |steps| {
        let root = TempDir::new().unwrap();
        runtime.block_on(async {
            let mut model = BTreeSet::new();
            for step in &steps {
                world.step(root.path(), &mut model, step).await;
            }
            let store = world.open(root.path()).await;
            world.check(&store, root.path(), &model);
        });
        Ok(())
    });
    result.unwrap();
}
