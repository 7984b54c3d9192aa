//! A process that pulls and removes is killed at any moment; what it has answered is there afterwards, and nothing else.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use isopod_image_store::{Auth, Digest, Endpoint, ImageStore, Limits, StoreConfig, convert_blob};
use support::registry::Registry;
use support::{Item, digest, noise, tar};
use tempfile::TempDir;

const THIS: &str = "what_was_answered_outlives_a_killed_process";
const IMAGES: u64 = 5;
const LAYERS: u64 = 7;
const ROUNDS: u64 = 20;
/// A process is killed at the latest after so many operations, so that none ends by itself.
const OPERATIONS: u64 = 10_000;

fn layer(number: u64) -> Vec<u8> {
    let data = noise(40_000 * (number as usize + 1), number);
    tar(&[Item::Dir("etc/"), Item::File("etc/noise", &data), Item::Symlink("x", "etc/noise")])
}

/// Each shares layers with others.
fn layers(image: u64) -> Vec<u64> {
    (0..3).map(|index| (image + index * index) % LAYERS).collect()
}

fn name(image: u64) -> String {
    format!("test.example/image:{image}")
}

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

fn store(root: &Path, registry: SocketAddr) -> ImageStore {
    let mut config = StoreConfig::new(root);
    let endpoint = Endpoint::new(format!("http://{registry}"));
    config.registries.mirrors = BTreeMap::from([("test.example".to_owned(), vec![endpoint])]);
    config.resume.min_bytes = 0;
    ImageStore::open(config).unwrap()
}

/// What the process does that is killed: each operation is told before it begins and after it was answered.
async fn operate(root: &str) {
    let variable = |name: &str| std::env::var(name).unwrap();
    let store = store(Path::new(root), variable("CRASH_REGISTRY").parse().unwrap());
    let mut seed: u64 = variable("CRASH_SEED").parse().unwrap();
    let tell = |text: String| {
        let mut output = std::io::stdout().lock();
        writeln!(output, "{text}").unwrap();
        output.flush().unwrap();
    };
    for _ in 0..OPERATIONS {
        let image = random(&mut seed) % IMAGES;
        if !random(&mut seed).is_multiple_of(3) {
            tell(format!("op begin pull {image}"));
            store.pull(&name(image), &Auth::Anonymous).await.unwrap();
            tell(format!("op end pull {image}"));
        } else {
            tell(format!("op begin remove {image}"));
            store.remove(&name(image)).unwrap();
            tell(format!("op end remove {image}"));
        }
    }
}

/// What is known of the images: there, not there, or either.
type Model = BTreeMap<u64, BTreeSet<bool>>;

/// Runs the process, kills it after `life`, and brings the model up to date. Gives the operations that were answered.
fn run_and_kill(root: &Path, registry: SocketAddr, seed: u64, life: Duration, model: &mut Model) -> usize {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", THIS, "--nocapture"])
        .env("CRASH_ROOT", root)
        .env("CRASH_REGISTRY", registry.to_string())
        .env("CRASH_SEED", seed.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // Its life begins with the first operation; before, it is the test's own start.
    let first = lines.by_ref().map(Result::unwrap).find(|line| line.contains("op begin"));
    std::thread::sleep(life);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut answered = 0;
    for line in first.into_iter().chain(lines.map(Result::unwrap)) {
        let Some((_, operation)) = line.split_once("op ") else { continue };
        let words: Vec<&str> = operation.split(' ').collect();
        let [moment, operation, image] = words[..] else { continue };
        let state = model.get_mut(&image.parse().unwrap()).unwrap();
        match moment {
            "begin" => drop(state.insert(operation == "pull")),
            _ => {
                *state = BTreeSet::from([operation == "pull"]);
                answered += 1;
            }
        }
    }
    answered
}

/// Holds the store against the model, and each file against what it must be.
fn check(store: &ImageStore, root: &Path, model: &mut Model, expected: &BTreeMap<Digest, Vec<u8>>) {
    let mut used = BTreeSet::new();
    let listed = store.images().unwrap();
    for (image, state) in model.iter_mut() {
        let found = store.find(&name(*image)).unwrap();
        assert!(state.contains(&found.is_some()), "image {image} is there: {}, not {state:?}", found.is_some());
        *state = BTreeSet::from([found.is_some()]);
        let Some(found) = found else { continue };
        assert!(listed.contains(&found));
        assert_eq!(store.disk(&found.id).unwrap().files.len(), 1 + 3);
        used.extend(layers(*image));
    }
    assert_eq!(listed.len(), model.values().filter(|state| state.contains(&true)).count());
    let files = |directory: &str| -> BTreeSet<String> {
        let entries = std::fs::read_dir(root.join(directory)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(files("tmp"), BTreeSet::new());
    assert_eq!(files("images").len(), listed.len());
    let digests = used.iter().map(|number| Digest::parse(&digest(&layer(*number))).unwrap());
    let wanted: BTreeMap<String, Digest> = digests.map(|digest| (format!("{}.erofs", digest.hex()), digest)).collect();
    assert_eq!(files("layers"), wanted.keys().cloned().collect());
    // What is kept of a pull that was cut is of a layer that is not there.
    let all: BTreeSet<String> = (0..LAYERS).map(|number| digest(&layer(number))).collect();
    for spool in files("ingest") {
        let (layer, _) = spool.split_once('.').unwrap();
        assert!(!wanted.contains_key(&format!("{layer}.erofs")) && all.contains(&format!("sha256:{layer}")), "{spool}");
    }
    for (file, digest) in wanted {
        assert!(
            std::fs::read(root.join("layers").join(file)).unwrap() == expected[&digest],
            "{digest} is as it must be"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_outlives_a_killed_process() {
    if let Ok(root) = std::env::var("CRASH_ROOT") {
        return operate(&root).await;
    }
    let registry = Registry::start().await;
    let work = TempDir::new().unwrap();
    let mut expected = BTreeMap::new();
    for number in 0..LAYERS {
        let path = work.path().join("layer");
        let report = convert_blob(layer(number).as_slice(), &path, &Limits::default()).unwrap();
        expected.insert(report.diff_id, std::fs::read(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
    }
    for image in 0..IMAGES {
        let mut tars: Vec<_> = layers(image).into_iter().map(layer).collect();
        tars.truncate(3);
        registry.put_image("image", &image.to_string(), &tars);
    }
    let root = work.path().join("store");
    let mut model: Model = (0..IMAGES).map(|image| (image, BTreeSet::from([false]))).collect();
    let (mut seed, mut answered) = (1, 0);
    for round in 0..ROUNDS {
        let life = Duration::from_micros(random(&mut seed) % 1_000_000);
        let (path, address, mut known) = (root.clone(), registry.address, model.clone());
        let run = move || (run_and_kill(&path, address, round, life, &mut known), known);
        let (count, known) = tokio::task::spawn_blocking(run).await.unwrap();
        (answered, model) = (answered + count, known);
        check(&store(&root, registry.address), &root, &mut model, &expected);
    }
    assert!(answered as u64 > ROUNDS, "only {answered} operations were answered");
}
