//! Loss of power at every moment of pulls and removals.
//!
//! A process pulls and removes images while strace records what it does to the store's files. Then, for each change that it made, a
//! store is put together of what a disk may hold if power is lost there (see `support/power.rs`), and opened: it must have the images
//! whose pull was answered and not those whose removal was, byte for byte, and nothing else.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use isopod_image_store::{Auth, Endpoint, ImageStore, StoreConfig};
use support::power::{self, Recording};
use support::world::{Chance, IMAGES, World, name};
use tempfile::TempDir;

const THIS: &str = "a_store_whose_machine_loses_power_has_what_was_answered";
/// In this order. Image by image they share layers.
const OPERATIONS: [Operation; 6] = [
    Operation::Pull(0),
    Operation::Pull(1),
    Operation::Remove(0),
    Operation::Pull(2),
    Operation::Remove(1),
    Operation::Pull(0),
];
/// Times that each moment is tried, as what does not last is up to chance.
const TRIES: u64 = 2;

#[derive(Clone, Copy)]
enum Operation {
    Pull(u64),
    Remove(u64),
}

/// What the process does that is recorded.
async fn operate(root: &str, registry: &str) {
    let mut config = StoreConfig::new(root);
    config.registries.mirrors.insert("test.example".to_owned(), vec![Endpoint::new(format!("http://{registry}"))]);
    config.resume.min_bytes = 0;
    let store = ImageStore::open(config).unwrap();
    for operation in OPERATIONS {
        match operation {
            Operation::Pull(image) => drop(store.pull(&name(image), &Auth::Anonymous).await.unwrap()),
            Operation::Remove(image) => store.remove(&name(image)).unwrap(),
        }
        // Whole and at once, as the answer of a call is.
        std::io::stdout().write_all(b"op answered\n").unwrap();
    }
}

fn record(root: &Path, registry: String) -> Recording {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", THIS, "--nocapture"]).env("POWER_ROOT", root).env("POWER_REGISTRY", registry);
    let (status, recording) = power::record(&mut program, root);
    assert!(status.success(), "{status}");
    assert_eq!(recording.said(recording.moments() - 1), OPERATIONS.len());
    recording
}

/// The images that are there after so many operations.
fn after(operations: usize) -> BTreeSet<u64> {
    OPERATIONS[..operations].iter().fold(BTreeSet::new(), |mut images, operation| {
        match operation {
            Operation::Pull(image) => drop(images.insert(*image)),
            Operation::Remove(image) => drop(images.remove(image)),
        }
        images
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_machine_loses_power_has_what_was_answered() {
    if let (Ok(root), Ok(registry)) = (std::env::var("POWER_ROOT"), std::env::var("POWER_REGISTRY")) {
        return operate(&root, &registry).await;
    }
    if !power::can_record() {
        println!("skipped: there is no strace");
        return;
    }
    let world = World::new().await;
    let work = TempDir::new().unwrap();
    // The store's directory is there, as the daemon has it made durable; nothing is in it.
    let (root, registry) = (work.path().join("store"), world.registry.address.to_string());
    fs::create_dir(&root).unwrap();
    let recording = tokio::task::spawn_blocking(move || record(&root, registry)).await.unwrap();
    println!("power is lost at {} moments", recording.moments());
    assert!(recording.moments() > 100, "only {} moments", recording.moments());
    let mut ways = [0, 0];
    for moment in 0..recording.moments() {
        for seed in 0..TRIES {
            let (files, directories) = recording.left(moment, &mut Chance(moment as u64 * TRIES + seed));
            let root = work.path().join("left");
            fs::create_dir(&root).unwrap();
            directories.iter().for_each(|directory| fs::create_dir(root.join(directory)).unwrap());
            files.iter().for_each(|(path, content)| fs::write(root.join(path), content).unwrap());
            let store = world.open(&root).await;
            let found = (0..IMAGES).filter(|image| store.find(&name(*image)).unwrap().is_some()).collect();
            let answered = recording.said(moment);
            let possible = [after(answered), after((answered + 1).min(OPERATIONS.len()))];
            let way = possible.iter().position(|images| *images == found);
            ways[way.unwrap_or_else(|| panic!("moment {moment}, try {seed}: {found:?} is none of {possible:?}"))] += 1;
            world.check(&store, &root, &found);
            drop(store);
            fs::remove_dir_all(&root).unwrap();
        }
    }
    let [undone, done] = ways;
    println!("the operation at hand was undone {undone} times, and done {done} times");
    assert!(undone > 0 && done > 0);
}
