//! A registry in this process, for behaviour a real one cannot be made to show.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Response, StatusCode};
use futures_util::stream;
use isopod_image_store::{Endpoint, ImageStore, StoreConfig};

use super::{digest, gzip};

/// How a path misbehaves, once or always.
#[derive(Clone)]
pub enum Fault {
    Status(u16),
    /// 429 with Retry-After: 0.
    TooMany,
    /// Ends the connection after so many bytes of the body.
    Cut(usize),
    /// Sends so many bytes of the body and then nothing.
    Hang(usize),
    /// Sends another body.
    Body(Vec<u8>),
    /// Sends zeros without end.
    Endless,
    /// Ignores the range that is asked for.
    NoRange,
    Redirect(String),
}

/// What the registry demands.
#[derive(Clone, Default)]
pub enum Access {
    #[default]
    Open,
    /// The value of the Authorization header.
    Basic(String),
    /// A token from /token, which gives it for this Authorization header.
    Token(String),
}

#[derive(Default)]
struct Content {
    files: HashMap<String, Vec<u8>>,
    faults: HashMap<String, Vec<Fault>>,
    access: Access,
    /// Each request: path, range, whether it had an Authorization header.
    requests: Vec<(String, Option<String>, bool)>,
    /// The same: path with its query, and headers.
    details: Vec<(String, HeaderMap)>,
    /// Bytes of answers for each path; what a client did not take is among them.
    served: HashMap<String, usize>,
    delay: Duration,
    /// Paths whose requests are counted while they are answered, how many are, and the most there were.
    counted: Vec<String>,
    at_once: (usize, usize),
}

#[derive(Clone)]
pub struct Registry {
    content: Arc<Mutex<Content>>,
    pub address: SocketAddr,
}

impl Registry {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let registry = Self { content: Arc::default(), address };
        let app = registry.app();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        registry
    }

    fn app(&self) -> Router {
        Router::new().fallback(answer).with_state(self.clone())
    }

    /// Serves the same over TLS.
    pub async fn serve_tls(&self, config: rustls::ServerConfig) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let app = self.app();
        tokio::spawn(async move { axum::serve(TlsListener { listener, acceptor }, app).await.unwrap() });
        address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A store whose images of `test.example` come from here.
    pub fn store(&self, root: &Path) -> ImageStore {
        ImageStore::open(self.config(root)).unwrap()
    }

    pub fn config(&self, root: &Path) -> StoreConfig {
        let mut config = StoreConfig::new(root);
        config.registries.mirrors = BTreeMap::from([("test.example".into(), vec![Endpoint::new(self.url())])]);
        config.registries.backoff = Duration::from_millis(10);
        config.registries.retries = 2;
        config
    }

    pub fn put(&self, path: &str, bytes: Vec<u8>) {
        self.content.lock().unwrap().files.insert(path.to_owned(), bytes);
    }

    /// The next requests to a path that ends in `path` misbehave like this, one fault each; the last one stays.
    pub fn fault(&self, path: &str, faults: &[Fault]) {
        self.content.lock().unwrap().faults.insert(path.to_owned(), faults.to_vec());
    }

    pub fn demand(&self, access: Access) {
        self.content.lock().unwrap().access = access;
    }

    pub fn slow_down(&self, delay: Duration) {
        self.content.lock().unwrap().delay = delay;
    }

    pub fn requests(&self) -> Vec<(String, Option<String>, bool)> {
        self.content.lock().unwrap().requests.clone()
    }

    /// Bytes of answers for the path that ends in `path`.
    pub fn served(&self, path: &str) -> usize {
        let content = self.content.lock().unwrap();
        content.served.iter().filter(|(served, _)| served.ends_with(path)).map(|(_, bytes)| bytes).sum()
    }

    /// Counts the requests to paths that end in one of `paths` while they are answered.
    pub fn count(&self, paths: &[String]) {
        self.content.lock().unwrap().counted = paths.to_vec();
    }

    /// The most such requests that there were at once.
    pub fn most_at_once(&self) -> usize {
        self.content.lock().unwrap().at_once.1
    }

    /// Each request: path with its query, and headers.
    pub fn details(&self) -> Vec<(String, HeaderMap)> {
        self.content.lock().unwrap().details.clone()
    }

    /// Puts an image of gzipped layers as `repository:tag`; gives the digests of its manifest, configuration and layers.
    pub fn put_image(&self, repository: &str, tag: &str, tars: &[Vec<u8>]) -> (String, String, Vec<String>) {
        let blobs: Vec<_> = tars.iter().map(|tar| gzip(tar)).collect();
        let diff_ids: Vec<_> = tars.iter().map(|tar| digest(tar)).collect();
        self.put_blobs(repository, tag, &blobs, &diff_ids)
    }

    pub fn put_blobs(
        &self,
        repository: &str,
        tag: &str,
        blobs: &[Vec<u8>],
        diff_ids: &[String],
    ) -> (String, String, Vec<String>) {
        let config = serde_json::json!({
            "os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "config": {"User": "1000:100", "Env": ["A=b"], "Entrypoint": ["/bin/sh"], "Cmd": ["-c"], "WorkingDir": "/w",
                       "StopSignal": "SIGQUIT", "Labels": {"l": "v"}, "Volumes": {"/v": {}}, "ExposedPorts": {"80/tcp": {}}}
        });
        let config = serde_json::to_vec(&config).unwrap();
        let layers: Vec<_> = blobs
            .iter()
            .map(|blob| {
                self.put(&format!("/v2/{repository}/blobs/{}", digest(blob)), blob.clone());
                serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                                   "digest": digest(blob), "size": blob.len()})
            })
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": layers,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                       "digest": digest(&config), "size": config.len()}
        });
        let manifest = serde_json::to_vec(&manifest).unwrap();
        self.put(&format!("/v2/{repository}/blobs/{}", digest(&config)), config.clone());
        self.put(&format!("/v2/{repository}/manifests/{tag}"), manifest.clone());
        self.put(&format!("/v2/{repository}/manifests/{}", digest(&manifest)), manifest.clone());
        (digest(&manifest), digest(&config), blobs.iter().map(|blob| digest(blob)).collect())
    }
}

/// Connections whose TLS handshake succeeds.
struct TlsListener {
    listener: tokio::net::TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = tokio_rustls::server::TlsStream<tokio::net::TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (connection, address) = self.listener.accept().await.unwrap();
            if let Ok(stream) = self.acceptor.accept(connection).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

fn status(code: u16) -> Response<Body> {
    Response::builder().status(code).body(Body::empty()).unwrap()
}

async fn answer(State(registry): State<Registry>, request: Request) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let headers = request.headers().clone();
    let with_query = request.uri().path_and_query().unwrap().to_string();
    drop(request);
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let (range, authorization) = (header("range"), header("authorization"));
    let (access, delay, counted) = {
        let mut content = registry.content.lock().unwrap();
        content.requests.push((path.clone(), range.clone(), authorization.is_some()));
        content.details.push((with_query, headers.clone()));
        let counted = content.counted.iter().any(|end| path.ends_with(end.as_str()));
        if counted {
            content.at_once.0 += 1;
            content.at_once.1 = content.at_once.1.max(content.at_once.0);
        }
        (content.access.clone(), content.delay, counted)
    };
    tokio::time::sleep(delay).await;
    if counted {
        registry.content.lock().unwrap().at_once.0 -= 1;
    }
    if path == "/token" {
        return match access {
            Access::Token(wanted) if authorization.unwrap_or_default() == wanted => {
                Response::new(Body::from(r#"{"token":"sesame"}"#))
            }
            _ => status(401),
        };
    }
    let (wanted, challenge) = match access {
        Access::Open => (None, String::new()),
        Access::Basic(wanted) => (Some(wanted), "Basic realm=\"test\"".to_owned()),
        Access::Token(_) => {
            let realm = format!("Bearer realm=\"{}/token\",service=\"test\"", registry.url());
            (Some("Bearer sesame".to_owned()), realm)
        }
    };
    if wanted.is_some() && authorization != wanted {
        return Response::builder().status(401).header("www-authenticate", challenge).body(Body::empty()).unwrap();
    }
    let (file, fault) = {
        let mut content = registry.content.lock().unwrap();
        let faults = content.faults.iter_mut().find(|(end, _)| path.ends_with(end.as_str())).map(|(_, faults)| faults);
        let fault = faults.and_then(|faults| match faults.len() {
            0 => None,
            1 => faults.first().cloned(),
            _ => Some(faults.remove(0)),
        });
        (content.files.get(&path).cloned(), fault)
    };
    let Some(file) = file else { return status(404) };
    let offset: usize = match (&range, &fault) {
        (_, Some(Fault::NoRange)) | (None, _) => 0,
        (Some(range), _) => range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap(),
    };
    let rest = Bytes::from(file[offset..].to_vec());
    let mut builder = Response::builder();
    if offset > 0 {
        let content_range = format!("bytes {offset}-{}/{}", file.len() - 1, file.len());
        builder = builder.status(StatusCode::PARTIAL_CONTENT).header("content-range", content_range);
    }
    let count = match &fault {
        Some(Fault::Cut(count) | Fault::Hang(count)) => rest.len().min(*count),
        Some(Fault::Status(_) | Fault::TooMany | Fault::Redirect(_)) => 0,
        _ => rest.len(),
    };
    *registry.content.lock().unwrap().served.entry(path).or_default() += count;
    misbehave(fault, builder, rest)
}

/// The answer with what is left of the file, as `fault` has it.
fn misbehave(fault: Option<Fault>, builder: axum::http::response::Builder, rest: Bytes) -> Response<Body> {
    let cut = |count: usize| rest.slice(..count.min(rest.len()));
    match fault {
        None | Some(Fault::NoRange) => builder.body(Body::from(rest)).unwrap(),
        Some(Fault::Status(code)) => status(code),
        Some(Fault::TooMany) => Response::builder().status(429).header("retry-after", "0").body(Body::empty()).unwrap(),
        Some(Fault::Redirect(url)) => {
            Response::builder().status(307).header("location", url).body(Body::empty()).unwrap()
        }
        Some(Fault::Body(body)) => builder.body(Body::from(body)).unwrap(),
        Some(Fault::Endless) => {
            let zeros = stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from(vec![0; 1 << 16])));
            builder.body(Body::from_stream(zeros)).unwrap()
        }
        Some(Fault::Cut(count)) => {
            let parts = vec![Ok(cut(count)), Err(std::io::Error::other("cut"))];
            // The pause lets the first part leave before the connection is torn down.
            let parts = stream::unfold(parts.into_iter(), |mut parts| async move {
                let part = parts.next()?;
                if part.is_err() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Some((part, parts))
            });
            builder.header("content-length", rest.len()).body(Body::from_stream(parts)).unwrap()
        }
        Some(Fault::Hang(count)) => {
            let first = stream::iter([Ok::<_, Infallible>(cut(count))]);
            let parts = futures_util::StreamExt::chain(first, stream::pending());
            builder.header("content-length", rest.len()).body(Body::from_stream(parts)).unwrap()
        }
    }
}
