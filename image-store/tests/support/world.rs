//! Some images of some layers in a registry, and what a store has that has pulled them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use isopod_image_store::{ImageStore, Limits, convert_blob};
use tempfile::TempDir;

use super::registry::Registry;
use super::{Item, digest, gzip, noise, tar};

pub const IMAGES: u64 = 4;
pub const LAYERS: u64 = 5;
pub const DATABASE: &str = "metadata.redb";

fn layer(number: u64) -> Vec<u8> {
    tar(&[Item::Dir("etc/"), Item::File("etc/noise", &noise(15_000 + 1000 * number as usize, number))])
}

pub fn layers(image: u64) -> BTreeSet<u64> {
    (0..3).map(|index| (image + index * index) % LAYERS).collect()
}

pub fn name(image: u64) -> String {
    format!("test.example/image:{image}")
}

/// The files of a store, by their paths in it.
pub type Files = BTreeMap<String, Vec<u8>>;

pub fn read(root: &Path) -> Files {
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

pub fn write(root: &Path, files: &Files) {
    for directory in ["layers", "images", "ingest", "tmp"] {
        std::fs::remove_dir_all(root.join(directory)).unwrap();
        std::fs::create_dir(root.join(directory)).unwrap();
    }
    for (path, content) in files {
        std::fs::write(root.join(path), content).unwrap();
    }
}

/// Decisions, each from the one before.
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    pub fn yes(&mut self) -> bool {
        self.below(2) == 1
    }

    /// What an unsynced file may be after a loss of power: shorter, or with blocks that were never written.
    pub fn torn(&mut self, content: &[u8]) -> Vec<u8> {
        let mut torn = content[..self.below(content.len() + 1)].to_vec();
        if self.yes() && !torn.is_empty() {
            let start = self.below(torn.len());
            let end = torn.len().min(start + 4096);
            torn[start..end].fill(0);
        }
        torn
    }
}

pub struct World {
    pub registry: Registry,
    /// Blob of each layer, and its file.
    pub blobs: Vec<String>,
    pub expected: Vec<(String, Vec<u8>)>,
}

impl World {
    pub async fn new() -> Self {
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
    pub async fn open(&self, root: &Path) -> ImageStore {
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

    /// Exactly the images that there must be, with exactly their files, byte for byte.
    pub fn check(&self, store: &ImageStore, root: &Path, model: &BTreeSet<u64>) {
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
}
