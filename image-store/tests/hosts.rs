//! Pulls through hosts that containerd's `hosts.toml` names.
#![allow(clippy::unwrap_used, reason = "unwrap is how a test fails")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use isopod_image_store::{Auth, Credentials, Endpoint, ImageStore, PullError, StoreConfig};
use isopod_proto::ErrorKind;
use isopod_proto::chain as shown;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use support::registry::{Access, Fault, Registry};
use support::{Item, gzip, noise, tar};
use tempfile::TempDir;

const NAME: &str = "test.example/a:1";

fn layer(seed: u64) -> Vec<u8> {
    tar(&[Item::File("noise", &noise(10_000, seed))])
}

/// A store in `root` whose `certs.d` is there as well.
fn store(root: &Path) -> ImageStore {
    let mut config = StoreConfig::new(root.join("store"));
    config.registries.certs_directory = Some(root.join("certs.d"));
    config.registries.backoff = Duration::from_millis(10);
    config.registries.retries = 2;
    ImageStore::open(config).unwrap()
}

/// Writes `certs.d/DIRECTORY/hosts.toml`.
fn hosts(root: &Path, directory: &str, text: &str) {
    let directory = root.join("certs.d").join(directory);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_are_asked_in_order_for_what_they_can() {
    let (pulls, resolves, server) = (Registry::start().await, Registry::start().await, Registry::start().await);
    let root = TempDir::new().unwrap();
    let (_, config, layers) = pulls.put_image("a", "1", &[layer(1), layer(2)]);
    resolves.put_image("a", "1", &[layer(1), layer(2)]);
    pulls.fault(&layers[1], &[Fault::Status(404)]);
    resolves.fault(&layers[1], &[Fault::Status(403)]);
    server.put_image("a", "1", &[layer(2)]);
    let text = format!(
        "server = {:?}\n[host.{:?}]\ncapabilities = [\"pull\"]\n[host.{:?}.header]\nx-mirror = [\"one\", \"two\"]\n[host.{:?}]\n",
        server.url(),
        pulls.url(),
        pulls.url(),
        resolves.url()
    );
    hosts(root.path(), "test.example", &text);
    let id = store(root.path()).pull(NAME, &Auth::Anonymous).await.unwrap();
    assert_eq!(id.to_string(), config);
    let paths = |registry: &Registry| -> Vec<String> { registry.details().into_iter().map(|(path, _)| path).collect() };
    let blob = |digest: &str| format!("/v2/a/blobs/{digest}?ns=test.example");
    assert_eq!(paths(&resolves), ["/v2/a/manifests/1?ns=test.example", &blob(&layers[1])]);
    assert_eq!(paths(&server), [blob(&layers[1])]);
    let asked = paths(&pulls);
    assert!(asked.len() == 3 && asked.iter().all(|path| path.starts_with("/v2/a/blobs/")), "{asked:?}");
    let marks = |registry: &Registry| -> Vec<usize> {
        registry.details().iter().map(|(_, headers)| headers.get_all("x-mirror").iter().count()).collect()
    };
    assert_eq!((marks(&pulls), marks(&resolves), marks(&server)), (vec![2; 3], vec![0; 2], vec![0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_files_counts_from_the_next_pull_on() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = store(root.path());
    registry.put_image("a", "1", &[layer(1)]);
    registry.put_image("b/c", "1", &[layer(1)]);
    hosts(root.path(), "_default", "server = \"http://127.0.0.1:1\"");
    assert_eq!(store.pull(NAME, &Auth::Anonymous).await.unwrap_err().kind(), ErrorKind::Unavailable);
    hosts(root.path(), "_default", &format!("server = {:?}", registry.url()));
    store.pull(NAME, &Auth::Anonymous).await.unwrap();
    // Without /v2, below a path, for a registry with a port.
    let text = format!("server = \"{}/v2/b\"\noverride_path = true", registry.url());
    hosts(root.path(), "test.example_5000_", &text);
    store.pull("test.example:5000/c:1", &Auth::Anonymous).await.unwrap();
    assert!(registry.details().iter().any(|(path, _)| path == "/v2/b/c/manifests/1?ns=test.example%3A5000"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_be_reached_costs_no_retries() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let mut config = StoreConfig::new(root.path().join("store"));
    config.registries.certs_directory = Some(root.path().join("certs.d"));
    config.registries.backoff = Duration::from_secs(60);
    let store = ImageStore::open(config).unwrap();
    registry.put_image("a", "1", &[layer(1)]);
    let text = format!("server = {:?}\n[host.\"http://127.0.0.1:1\"]\n", registry.url());
    hosts(root.path(), "test.example", &text);
    let start = Instant::now();
    store.pull(NAME, &Auth::Anonymous).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_name_a_server_go_there_alone() {
    let (mirror, server) = (Registry::start().await, Registry::start().await);
    let root = TempDir::new().unwrap();
    let store = store(root.path());
    let (_, _, layers) = server.put_image("a", "1", &[layer(1)]);
    let basic = Access::Basic("Basic dXNlcjpwYXNz".into());
    mirror.demand(basic.clone());
    server.demand(basic);
    let text = format!("server = {:?}\n[host.{:?}]\nheader = {{ x-secret = \"s\" }}\n", server.url(), mirror.url());
    hosts(root.path(), "test.example", &text);
    let auth = Auth::Basic { username: "user".into(), password: "pass".into() };
    let credentials = |server: &str| Credentials { auth: auth.clone(), server: Some(server.to_owned()) };
    store.pull(NAME, credentials(&server.url())).await.unwrap();
    assert!(mirror.requests().iter().all(|(_, _, authorized)| !authorized));
    store.remove(NAME).unwrap();

    // The name of the registry means none of its mirrors.
    let error = store.pull(NAME, credentials("test.example")).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { .. }), "{error}");
    let error = store.pull(NAME, credentials("https://other.example")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(shown(&error).contains("other.example"));

    // None is named: all are meant. A redirect gets neither these nor the host's headers.
    let storage = Registry::start().await;
    storage.put("/blob", gzip(&layer(1)));
    mirror.put_image("a", "1", &[layer(1)]);
    mirror.fault(&layers[0], &[Fault::Redirect(format!("{}/blob", storage.url()))]);
    store.pull(NAME, &auth).await.unwrap();
    assert!(mirror.requests().iter().any(|(_, _, authorized)| *authorized));
    let details = storage.details();
    assert_eq!(details.len(), 1);
    assert!(!details[0].1.contains_key("authorization") && !details[0].1.contains_key("x-secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_in_a_file_is_told_and_nobody_is_asked() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let store = store(root.path());
    registry.put_image("a", "1", &[layer(1)]);
    let server = format!("server = {:?}\n", registry.url());
    for (text, words) in [
        ("skip_verify = 1", ["test.example/hosts.toml", "skip_verify"]),
        ("ca = \"not-there.crt\"", ["test.example/not-there.crt", "cannot be read"]),
        ("ca = \"hosts.toml\"", ["test.example/hosts.toml", "no certificates"]),
        ("client = \"hosts.toml\"", ["test.example/hosts.toml", "client certificate"]),
        ("capabilities = [\"pull\"]", ["test.example/hosts.toml", "resolve"]),
        ("capabilities =", ["test.example/hosts.toml", "TOML"]),
    ] {
        hosts(root.path(), "test.example", &(server.clone() + text));
        let error = store.pull(NAME, &Auth::Anonymous).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(words.iter().all(|word| shown(&error).contains(word)), "{}", shown(&error));
    }
    assert_eq!(registry.requests(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_of_the_store_s_configuration_comes_before_the_files() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    let mut config = registry.config(&root.path().join("store"));
    config.registries.certs_directory = Some(root.path().join("certs.d"));
    assert_eq!(config.registries.mirrors["test.example"], [Endpoint::new(registry.url())]);
    let store = ImageStore::open(config).unwrap();
    registry.put_image("a", "1", &[layer(1)]);
    hosts(root.path(), "test.example", "this makes no sense");
    store.pull(NAME, &Auth::Anonymous).await.unwrap();
}

/// A certificate authority, and what it has signed for 127.0.0.1.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate and its key, in PEM.
    fn certificate(&self) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        (parameters.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// A server that wants certificates of `client`.
    fn server(&self, client: Option<&Self>) -> rustls::ServerConfig {
        let (certificate, key) = self.certificate();
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let builder = rustls::ServerConfig::builder();
        let builder = match client {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = rustls::RootCertStore::empty();
                roots.add(authority.0.der().clone()).unwrap();
                let verifier = rustls::server::WebPkiClientVerifier::builder(roots.into()).build().unwrap();
                builder.with_client_cert_verifier(verifier)
            }
        };
        builder.with_single_cert(chain, key).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked_and_shown_as_the_file_says() {
    let registry = Registry::start().await;
    let root = TempDir::new().unwrap();
    // Also makes the process's cryptography.
    let store = store(root.path());
    registry.put_image("a", "1", &[layer(1)]);
    let (authority, clients) = (Authority::new(), Authority::new());
    let address = registry.serve_tls(authority.server(Some(&clients))).await;
    let open = registry.serve_tls(authority.server(None)).await;
    let directory = root.path().join("certs.d/test.example");
    std::fs::create_dir_all(&directory).unwrap();
    let (certificate, key) = clients.certificate();
    let other = Authority::new();
    for (name, text) in [
        ("ca.pem", authority.0.pem()),
        ("other.pem", other.0.pem()),
        ("client.pem", certificate.clone()),
        ("client.key", key.clone()),
        ("both.pem", certificate + &key),
    ] {
        std::fs::write(directory.join(name), text).unwrap();
    }
    for (address, text, good) in [
        (open, "", false),
        (open, "ca = \"other.pem\"", false),
        (open, "ca = [\"other.pem\", \"ca.pem\"]", true),
        (open, "skip_verify = true", true),
        (address, "ca = \"ca.pem\"", false),
        (address, "ca = \"ca.pem\"\nclient = \"both.pem\"", true),
        (address, "ca = \"ca.pem\"\nclient = [[\"client.pem\", \"client.key\"]]", true),
    ] {
        hosts(root.path(), "test.example", &format!("server = \"https://{address}\"\n{text}"));
        let pulled = store.pull(NAME, &Auth::Anonymous).await;
        assert_eq!(pulled.is_ok(), good, "{text}: {pulled:?}");
        store.remove(NAME).unwrap();
    }
}

/// Pulls `NAME` in a process of its own, with `variables` and the root of the store.
fn pulled_elsewhere(test: &str, root: &Path, variables: &[(&str, &str)]) -> bool {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command.args(["--exact", test]).env("PULL_IN", root).envs(variables.iter().copied());
    command.output().unwrap().status.success()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_s_proxies_are_asked() {
    if let Ok(root) = std::env::var("PULL_IN") {
        store(Path::new(&root)).pull(NAME, &Auth::Anonymous).await.unwrap();
        return;
    }
    let registry = Registry::start().await;
    registry.put_image("a", "1", &[layer(1)]);
    let root = TempDir::new().unwrap();
    let (proxy, dead) = (registry.url(), "http://127.0.0.1:1");
    let pulled = |variables: &[(&str, &str)]| {
        let _ = std::fs::remove_dir_all(root.path().join("store"));
        pulled_elsewhere("the_environment_s_proxies_are_asked", root.path(), variables)
    };
    // Nobody but the proxy knows this host.
    hosts(root.path(), "test.example", "server = \"http://registry.invalid\"");
    assert!(!pulled(&[]));
    for name in ["HTTP_PROXY", "http_proxy"] {
        assert!(pulled(&[(name, &proxy)]), "{name}");
    }
    assert!(!pulled(&[("HTTP_PROXY", &proxy), ("NO_PROXY", ".other,registry.invalid")]));
    // The file's own proxy is used whatever the environment says.
    hosts(root.path(), "test.example", &format!("server = \"http://registry.invalid\"\nproxy = {proxy:?}"));
    assert!(pulled(&[("HTTP_PROXY", dead), ("NO_PROXY", "*")]));
    // This machine is never asked through a proxy.
    hosts(root.path(), "test.example", &format!("server = {:?}", registry.url()));
    assert!(pulled(&[("HTTP_PROXY", dead)]));
    // For https, the proxy is asked for a tunnel.
    hosts(root.path(), "test.example", "server = \"https://registry.invalid\"");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let tunnel = format!("http://{}", listener.local_addr().unwrap());
    let asked = std::thread::spawn(move || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(listener.accept().unwrap().0), &mut line).unwrap();
        line
    });
    assert!(!pulled(&[("HTTPS_PROXY", &tunnel)]));
    assert_eq!(asked.join().unwrap(), "CONNECT registry.invalid:443 HTTP/1.1\r\n");
}
