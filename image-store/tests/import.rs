//! Imports of archives, good and hostile ones.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::io::{Cursor, Read};
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use isopod_image_store::{Auth, ImageStore, ImportError, Imported, PreloadError, Preloaded, Progress, StoreConfig};
use isopod_proto::ErrorKind;
use isopod_proto::chain as shown;
use serde_json::{Value, json};
use support::registry::Registry;
use support::{Item, digest, gzip, noise, tar};
use tempfile::TempDir;

const NAME: &str = "test.example/a:1";

fn layer(seed: u64) -> Vec<u8> {
    tar(&[Item::Dir("etc/"), Item::File("etc/noise", &noise(300_000, seed))])
}

fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
    let config = json!({"os": "linux", "architecture": "amd64", "config": {"User": "7"},
                        "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    config.to_string().into_bytes()
}

/// The files of an OCI layout.
#[derive(Default)]
struct Layout {
    files: Vec<(String, Vec<u8>)>,
    manifests: Vec<Value>,
}

impl Layout {
    fn blob(&mut self, bytes: &[u8]) -> Value {
        let digest = digest(bytes);
        self.files.push((format!("blobs/{}", digest.replace(':', "/")), bytes.to_vec()));
        json!({"digest": digest, "size": bytes.len()})
    }

    /// Adds an image, and gives its id.
    fn image(&mut self, layers: &[Vec<u8>], annotations: Value) -> String {
        let kind = "application/vnd.oci.image.";
        let mut blobs: Vec<Value> = layers.iter().map(|layer| self.blob(&gzip(layer))).collect();
        blobs.iter_mut().for_each(|blob| blob["mediaType"] = format!("{kind}layer.v1.tar+gzip").into());
        let mut config = self.blob(&config(layers));
        config["mediaType"] = format!("{kind}config.v1+json").into();
        let id = config["digest"].as_str().unwrap().to_owned();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": blobs});
        let mut manifest = self.blob(manifest.to_string().as_bytes());
        manifest["annotations"] = annotations;
        self.manifests.push(manifest);
        id
    }

    /// Adds what says that it is a layout.
    fn finish(&mut self) {
        // At the end, as some programs have it.
        self.files.push(("oci-layout".into(), br#"{"imageLayoutVersion": "1.0.0"}"#.to_vec()));
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        self.files.push(("./index.json".into(), index.to_string().into_bytes()));
    }

    fn tar(mut self) -> Vec<u8> {
        self.finish();
        tar(&self.files.iter().map(|(name, data)| Item::File(name, data)).collect::<Vec<_>>())
    }
}

fn store(root: &Path) -> ImageStore {
    let mut config = StoreConfig::new(root);
    config.limits.max_archive_bytes = 20 << 20;
    ImageStore::open(config).unwrap()
}

async fn import(store: &ImageStore, archive: Vec<u8>, name: Option<&str>) -> Result<Vec<Imported>, ImportError> {
    store.import(Cursor::new(archive), name, |_| {}).await
}

fn files(root: &Path) -> usize {
    ["layers", "images", "tmp"].iter().map(|name| std::fs::read_dir(root.join(name)).unwrap().count()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layout_gives_the_images_that_a_pull_would() {
    let root = TempDir::new().unwrap();
    let store = store(root.path());
    let mut layout = Layout::default();
    let full = json!({"io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "1"});
    let first = layout.image(&[layer(1), layer(2)], full);
    let second = layout.image(&[layer(1)], json!({"org.opencontainers.image.ref.name": "busybox:2"}));
    let archive = layout.tar();
    let events = Mutex::new(Vec::new());
    let told = |progress| events.lock().unwrap().push(progress);
    let imported = store.import(Cursor::new(archive.clone()), None, told).await.unwrap();
    let ids: Vec<_> = imported.iter().map(|image| image.id.to_string()).collect();
    assert_eq!(ids, [first.clone(), second]);
    let image = store.find(NAME).unwrap().unwrap();
    assert_eq!((image.id.to_string(), image.layers, image.config.user.as_str()), (first.clone(), 2, "7"));
    assert!(image.repo_digests[0].starts_with("test.example/a@sha256:"));
    assert!(store.find("docker.io/library/busybox:2").unwrap().is_some());
    assert_eq!(std::fs::read_dir(root.path().join("layers")).unwrap().count(), 2, "no layer is stored twice");
    let events = events.into_inner().unwrap();
    assert_eq!(events[0], Progress::Read { images: 2, layers: 3 });
    assert_eq!(events.iter().filter(|event| matches!(event, Progress::Layers(_))).count(), 3);

    // The same image from a registry is the same, and costs no layer.
    let registry = Registry::start().await;
    drop(store);
    let store = registry.store(root.path());
    for blob in [gzip(&layer(1)), gzip(&layer(2))] {
        registry.put(&format!("/v2/a/blobs/{}", digest(&blob)), blob);
    }
    let config = config(&[layer(1), layer(2)]);
    let (_, _, layers) = registry.put_image("a", "2", &[layer(1), layer(2)]);
    store.pull("test.example/a:2", &Auth::Anonymous).await.unwrap();
    assert_eq!(digest(&config), first);
    assert!(registry.requests().iter().all(|(path, ..)| layers.iter().all(|layer| !path.ends_with(layer))));

    // Compressed, and once more.
    let again = store.import(Cursor::new(gzip(&archive)), None, |_| {}).await.unwrap();
    assert_eq!(again, imported);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_of_docker_save_is_understood() {
    let root = TempDir::new().unwrap();
    let store = store(root.path());
    let layers = [layer(1), layer(2), layer(1)];
    let config = config(&layers);
    let manifest = json!([{"Config": "c.json", "RepoTags": ["a:1", "test.example/b:2"],
                           "Layers": ["x/layer.tar", "y/layer.tar", "z/layer.tar"]}]);
    let manifest = manifest.to_string();
    let archive = tar(&[
        Item::Dir("x/"),
        Item::File("x/layer.tar", &layers[0]),
        Item::File("y/layer.tar", &layers[1]),
        Item::Symlink("z/layer.tar", "../x/layer.tar"),
        Item::File("c.json", &config),
        Item::File("manifest.json", manifest.as_bytes()),
    ]);
    let imported = import(&store, archive, None).await.unwrap();
    assert_eq!(imported[0].id.to_string(), digest(&config));
    let image = store.find("a:1").unwrap().unwrap();
    assert_eq!(image.repo_tags, ["docker.io/library/a:1", "test.example/b:2"]);
    assert_eq!((image.layers, image.repo_digests.len()), (3, 0));
    assert!(store.disk(&image.id).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_given_to_what_has_none() {
    let root = TempDir::new().unwrap();
    let store = store(root.path());
    let archive = |annotations: Value| {
        let mut layout = Layout::default();
        layout.image(&[layer(1)], annotations);
        layout.tar()
    };
    let error = import(&store, archive(json!({})), None).await.unwrap_err();
    assert!(matches!(error, ImportError::NoName { .. }), "{error}");
    import(&store, archive(json!({})), Some("given.example/a:1")).await.unwrap();
    let tag = json!({"org.opencontainers.image.ref.name": "7"});
    import(&store, archive(tag.clone()), Some("given.example:5000/b")).await.unwrap();
    import(&store, archive(tag), Some("given.example/c:8")).await.unwrap();
    for name in ["given.example/a:1", "given.example:5000/b:7", "given.example/c:8"] {
        assert!(store.find(name).unwrap().is_some(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_archives_are_refused_and_leave_nothing() {
    let name = json!({"io.containerd.image.name": NAME});
    let layout = |change: &dyn Fn(&mut Layout)| {
        let mut layout = Layout::default();
        layout.image(&[layer(1), layer(2)], name.clone());
        change(&mut layout);
        layout.tar()
    };
    let saved = |manifest: Value, layer: &[u8], config: &[u8]| {
        let manifest = manifest.to_string();
        tar(&[
            Item::File("manifest.json", manifest.as_bytes()),
            Item::File("c.json", config),
            Item::File("layer.tar", layer),
            Item::Symlink("loop", "loop"),
        ])
    };
    let image = |layers: Value| json!([{"Config": "c.json", "RepoTags": [NAME], "Layers": layers}]);
    let good = config(&[layer(1)]);
    let evil = tar(&[Item::File("a/../../etc/passwd", b"x")]);
    let large = vec![b' '; 5 << 20];
    let whole = layout(&|_| {});
    let long = Item::File("x", &vec![0; 21 << 20]);
    for (archive, kind, word) in [
        (b"no archive at all".to_vec(), ErrorKind::Corrupt, "stream ends"),
        (tar(&[]), ErrorKind::Corrupt, "no image archive"),
        (whole[..whole.len() / 2].to_vec(), ErrorKind::Corrupt, "stream ends"),
        (layout(&|layout| layout.files[0].1[100] ^= 1), ErrorKind::Corrupt, "layer"),
        (layout(&|layout| layout.files[2].1[10] ^= 1), ErrorKind::Corrupt, "digest"),
        (layout(&|layout| drop(layout.files.remove(1))), ErrorKind::Corrupt, "has no file"),
        (layout(&|layout| layout.manifests[0]["digest"] = "x".into()), ErrorKind::Corrupt, "index.json"),
        (layout(&|layout| layout.manifests[0]["platform"] = json!({"os": "a"})), ErrorKind::NotFound, "linux/amd64"),
        (saved(image(json!(["layer.tar"])), &layer(2), &good), ErrorKind::Corrupt, "diff id"),
        (saved(image(json!(["../layer.tar"])), &layer(1), &good), ErrorKind::Corrupt, "no file"),
        (saved(image(json!(["/etc/passwd"])), &layer(1), &good), ErrorKind::Corrupt, "no file"),
        (saved(image(json!(["loop"])), &layer(1), &good), ErrorKind::Corrupt, "no file"),
        (saved(image(json!(["layer.tar", "layer.tar"])), &layer(1), &good), ErrorKind::Corrupt, "2 layers"),
        (saved(image(json!(["layer.tar"])), &evil, &config(std::slice::from_ref(&evil))), ErrorKind::Corrupt, "\"..\""),
        (saved(image(json!(["layer.tar"])), &layer(1), &large), ErrorKind::Corrupt, "c.json"),
        (saved(json!({}), &layer(1), &good), ErrorKind::Corrupt, "manifest.json"),
        (tar(&[long]), ErrorKind::ResourceExhausted, "20971520"),
    ] {
        let root = TempDir::new().unwrap();
        let store = store(root.path());
        let error = import(&store, archive, None).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{}", shown(&error));
        assert!(shown(&error).contains(word), "{:?} does not say {word:?}", shown(&error));
        assert!(store.images().unwrap().is_empty());
        assert_eq!(files(root.path()), 0, "{}", shown(&error));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_dropped_leaves_nothing() {
    /// Gives an archive's first half, and then waits for somebody to write.
    struct Hanging(Cursor<Vec<u8>>, std::io::PipeReader);
    impl Read for Hanging {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            match self.0.read(buffer)? {
                0 => self.1.read(buffer),
                length => Ok(length),
            }
        }
    }
    let root = TempDir::new().unwrap();
    let store = store(root.path());
    let mut layout = Layout::default();
    layout.image(&[layer(1)], json!({"io.containerd.image.name": NAME}));
    let archive = layout.tar();
    let (reader, writer) = std::io::pipe().unwrap();
    let half = Hanging(Cursor::new(archive[..archive.len() / 2].to_vec()), reader);
    let given_up = tokio::time::timeout(Duration::from_millis(300), store.import(half, None, |_| {})).await;
    assert!(given_up.is_err());
    drop(writer);
    assert_eq!(files(root.path()), 0);
    assert_eq!(import(&store, archive, None).await.unwrap().len(), 1);
}

/// What is in `directory` as it is preloaded: file and outcome, shortened.
async fn preload(store: &ImageStore, directory: &Path) -> Vec<(String, String)> {
    let outcomes = Mutex::new(Vec::new());
    let told = |path: &Path, result: Result<Preloaded, PreloadError>| {
        let outcome = match result {
            Ok(Preloaded::Unchanged) => "unchanged".to_owned(),
            Ok(Preloaded::Imported(images)) => format!("imported {}", images.len()),
            Err(error) => {
                assert!(shown(&error).contains(path.to_str().unwrap()), "{}", shown(&error));
                "failed".to_owned()
            }
        };
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        outcomes.lock().unwrap().push((file, outcome));
    };
    store.preload(directory, told).await;
    outcomes.into_inner().unwrap()
}

fn outcomes(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(file, outcome)| ((*file).to_owned(), (*outcome).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_preloaded_and_read_again_only_where_it_changed() {
    let (root, work) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let store = store(root.path());
    let path = |name: &str| work.path().join(name);
    let mut layout = Layout::default();
    let first = layout.image(&[layer(1), layer(2)], json!({"io.containerd.image.name": NAME}));
    layout.finish();
    for (name, data) in &layout.files {
        let path = path("2-layout").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, data).unwrap();
    }
    let mut layout = Layout::default();
    let second = layout.image(&[layer(2), layer(3)], json!({"io.containerd.image.name": "test.example/b:1"}));
    let archive = gzip(&layout.tar());
    std::fs::write(path("1.tar.gz"), &archive[..archive.len() / 2]).unwrap();
    std::fs::write(path("3.tar.gz"), &archive).unwrap();
    std::fs::write(path(".incomplete"), "x").unwrap();
    std::fs::create_dir(path("4-empty")).unwrap();
    support::run("mkfifo", &[path("5-pipe").to_str().unwrap()]);
    let bad = |first: &'static str, second: &'static str| {
        let failed = "failed";
        outcomes(&[
            ("1.tar.gz", failed),
            ("2-layout", first),
            ("3.tar.gz", second),
            ("4-empty", failed),
            ("5-pipe", failed),
        ])
    };
    assert_eq!(preload(&store, work.path()).await, bad("imported 1", "imported 1"));
    for id in [&first, &second] {
        assert!(store.find(id).unwrap().unwrap().pinned);
    }
    assert_eq!(std::fs::read_dir(root.path().join("layers")).unwrap().count(), 3);

    // Changed so that nobody can tell, and so never read; also by the next process.
    let file = || std::fs::File::options().write(true).open(path("3.tar.gz")).unwrap();
    let modified = file().metadata().unwrap().modified().unwrap();
    std::fs::write(path("3.tar.gz"), vec![0; archive.len()]).unwrap();
    file().set_modified(modified).unwrap();
    assert_eq!(preload(&store, work.path()).await, bad("unchanged", "unchanged"));
    drop(store);
    let store = self::store(root.path());
    assert_eq!(preload(&store, work.path()).await, bad("unchanged", "unchanged"));

    // Changed; and an image that was removed, which comes back.
    std::fs::write(path("3.tar.gz"), &archive).unwrap();
    store.remove(&first).unwrap();
    assert_eq!(preload(&store, work.path()).await, bad("imported 1", "imported 1"));
    assert!(store.find(NAME).unwrap().unwrap().pinned);

    // An image whose file is gone stays, but not for ever.
    std::fs::remove_file(path("3.tar.gz")).unwrap();
    preload(&store, work.path()).await;
    assert!(!store.find(&second).unwrap().unwrap().pinned && store.find(&first).unwrap().unwrap().pinned);
    assert_eq!(preload(&store, &path("nowhere")).await, outcomes(&[("nowhere", "failed")]));
}
