//! Random pulls, cut pulls, removals and crashes against a model.
//!
//! A crash is the store's directory as it was somewhere in the operation, put together of what was there before it and what is after
//! it, by the order in which the store makes things durable. A pull syncs and renames each layer, then the metadata file, then commits
//! the database; a removal commits first and then unlinks. So with the old database all old files are there and any of the new ones,
//! the metadata file only if all its layers are; with the new one all new files and any of the old ones. What is never synced, `tmp`
//! and `ingest`, may hold anything. That this is the order, and what torn writes within the database's file do, is for `power_loss.rs`.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use isopod_image_store::{Auth, ImageStore};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::registry::Fault;
use support::world::{Chance, DATABASE, Files, IMAGES, World, name, read, write};
use tempfile::TempDir;

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

async fn operate(world: &World, store: &ImageStore, root: &Path, operation: &Operation) {
    match operation {
        Operation::Pull(image) => drop(store.pull(&name(*image), &Auth::Anonymous).await.unwrap()),
        Operation::Remove(image) => store.remove(&name(*image)).unwrap(),
        Operation::Cut(image, bytes) => {
            world.blobs.iter().for_each(|blob| world.registry.fault(blob, &[Fault::Hang(*bytes)]));
            // Ends by itself if all its layers are here.
            let name = name(*image);
            let pulled = store.pull(&name, &Auth::Anonymous);
            let _ = tokio::time::timeout(Duration::from_millis(100), pulled).await;
            world.blobs.iter().for_each(|blob| world.registry.fault(blob, &[]));
            while std::fs::read_dir(root.join("tmp")).unwrap().next().is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

/// A step, after which the model is of what is there.
async fn step(world: &World, root: &Path, model: &mut BTreeSet<u64>, step: &Step) {
    let store = world.open(root).await;
    world.check(&store, root, model);
    let before = read(root);
    operate(world, &store, root, &step.operation).await;
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
        world.check(&store, root, &done);
    }
    drop(store);
    match step.crash {
        None => *model = done,
        Some(seed) => {
            drop(world.open(root).await);
            let (files, committed) = crashed(&before, &after, seed);
            write(root, &files);
            if committed {
                *model = done;
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
                self::step(&world, root.path(), &mut model, step).await;
            }
            let store = world.open(root.path()).await;
            world.check(&store, root.path(), &model);
        });
        Ok(())
    });
    result.unwrap();
}
