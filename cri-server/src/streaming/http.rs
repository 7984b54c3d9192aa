//! The HTTP server: finds the session that a token stands for and hands the connection over to SPDY or WebSocket.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderName, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::requests::{Requests, Session, Wanted};
use super::stream::Life;
use super::{port_forward, remote_command, spdy, websocket};
use crate::runtime::Runtime;

/// How long a client may take to send the head of its request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of it.
const MAX_HEAD: usize = 16 * 1024;
/// Connections at once.
const MAX_CONNECTIONS: usize = 2000;
/// Pause after a failed accept, which is for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

type Answer = Response<Full<Bytes>>;

/// What the server works with. Clones are the same one.
#[derive(Clone)]
pub struct Server {
    /// The sandboxes.
    pub runtime: Runtime,
    /// The sessions that wait.
    pub requests: Arc<Requests>,
    /// Longest silence of a client.
    pub idle_timeout: Duration,
    /// Owner of the connections' tasks.
    pub tasks: TaskTracker,
    /// The daemon ends.
    pub stopping: CancellationToken,
}

impl Server {
    /// Accepts connections until the daemon ends.
    pub async fn run(self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let place = Arc::clone(&places).acquire_owned().await;
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.stopping.cancelled() => return,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let server = self.clone();
            self.tasks.spawn(async move {
                server.connection(stream).await;
                drop(place);
            });
        }
    }

    /// Serves one connection: its request, and the session that comes of it, in the same task.
    async fn connection(&self, stream: TcpStream) {
        // What a terminal types is not to wait for more; that it cannot be set costs time, nothing else.
        let _ = stream.set_nodelay(true);
        let Ok(socket) = stream.as_fd().try_clone_to_owned() else { return };
        let session = Arc::new(parking_lot::Mutex::new(None));
        let service = service_fn(|request: Request<Incoming>| {
            let answer = self.answer(request, &mut session.lock());
            async move { Ok::<_, Infallible>(answer) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let served = tokio::select! {
            served = connection => served,
            () = self.stopping.cancelled() => return,
        };
        if let Err(error) = served {
            tracing::debug!(%error, "a streaming connection failed");
        }
        let upgrade = session.lock().take();
        if let Some(Upgrade { session, transport, upgraded }) = upgrade {
            match upgraded.await {
                Ok(upgraded) => self.session(session, transport, TokioIo::new(upgraded), socket).await,
                Err(error) => tracing::debug!(%error, "a streaming connection was lost"),
            }
        }
    }

    async fn session(
        &self,
        session: Session,
        transport: Transport,
        io: TokioIo<hyper::upgrade::Upgraded>,
        socket: OwnedFd,
    ) {
        let life = Life::new(Arc::new(socket), self.stopping.child_token());
        tracing::debug!(kind = session.path(), ?transport, "a streaming session begins");
        let (runtime, idle, lost) = (&self.runtime, self.idle_timeout, life.lost.clone());
        match (transport, session) {
            (Transport::Spdy(_), Session::PortForward { sandbox, .. }) => {
                spdy::serve(io, life, idle, |opened| port_forward::run(runtime, sandbox, opened, lost)).await;
            }
            (Transport::Spdy(protocol), session) => {
                let serve = async |opened| {
                    let gathered = remote_command::gather(opened, wanted(&session), protocol);
                    let client = tokio::select! {
                        client = gathered => client,
                        () = lost.cancelled() => None,
                    };
                    match client {
                        Some(client) => remote_command::run(runtime, session, client, &lost).await,
                        None => lost.cancel(),
                    }
                };
                spdy::serve(io, life, idle, serve).await;
            }
            (Transport::Tunnel, Session::PortForward { sandbox, .. }) => {
                let (inner, tunnel) = websocket::tunnel(io, life.clone()).await;
                let serve = spdy::serve(inner, life, idle, |opened| port_forward::run(runtime, sandbox, opened, lost));
                tokio::join!(serve, tunnel);
            }
            (Transport::Channels(protocol), Session::PortForward { sandbox, ports }) => {
                websocket::forward(runtime, sandbox, &ports, io, protocol, life, idle).await;
            }
            (Transport::Channels(protocol), session) => {
                let wanted = wanted(&session);
                let run = async |client| remote_command::run(runtime, session, client, &lost).await;
                websocket::serve(io, protocol, wanted, life, idle, run).await;
            }
            // Not negotiated for those.
            (Transport::Tunnel, Session::Exec { .. } | Session::Attach { .. }) => {}
        }
    }

    /// Answers a request; an upgrade is left in `upgrade`.
    fn answer(&self, mut request: Request<Incoming>, upgrade: &mut Option<Upgrade>) -> Answer {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST are understood");
        }
        let mut parts = request.uri().path().trim_start_matches('/').split('/');
        let (Some(path), Some(token), None) = (parts.next(), parts.next(), parts.next()) else {
            return plain(StatusCode::NOT_FOUND, "there is nothing here");
        };
        let Some(session) = self.requests.take(Instant::now(), path, token) else {
            return plain(StatusCode::NOT_FOUND, "this URL is not known, was used already, or has expired");
        };
        let (transport, answer) = match negotiate(request.headers(), &session) {
            Ok(negotiated) => negotiated,
            Err(refusal) => return *refusal,
        };
        *upgrade = Some(Upgrade { session, transport, upgraded: hyper::upgrade::on(&mut request) });
        answer
    }
}

/// A connection that is handed over.
struct Upgrade {
    session: Session,
    transport: Transport,
    upgraded: hyper::upgrade::OnUpgrade,
}

/// What the connection speaks from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    /// SPDY/3.1, with this version of the protocol above it.
    Spdy(&'static str),
    /// WebSocket, a message of which has a channel's number first.
    Channels(websocket::Protocol),
    /// WebSocket, whose messages are SPDY/3.1.
    Tunnel,
}

fn wanted(session: &Session) -> Wanted {
    match session {
        Session::Exec { wanted, .. } | Session::Attach { wanted, .. } => *wanted,
        Session::PortForward { .. } => Wanted::default(),
    }
}

fn plain(status: StatusCode, text: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(format!("{text}\n"))));
    *answer.status_mut() = status;
    answer
}

/// The words of a header that is a list, over all the lines it has.
pub(super) fn words(headers: &HeaderMap, name: HeaderName) -> Vec<&str> {
    let lines = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|word| !word.is_empty()).collect()
}

/// Chooses what will be spoken: the protocol the client names first of those that are known.
fn negotiate(headers: &HeaderMap, session: &Session) -> Result<(Transport, Answer), Box<Answer>> {
    let forward = matches!(session, Session::PortForward { .. });
    let asks = words(headers, CONNECTION).iter().any(|word| word.eq_ignore_ascii_case("upgrade"));
    let upgrade = words(headers, UPGRADE);
    let upgrade = |name: &str| asks && upgrade.iter().any(|word| word.eq_ignore_ascii_case(name));
    if upgrade("websocket") {
        return websocket::negotiate(headers, forward).map(|(protocol, answer)| match protocol {
            websocket::Negotiated::Channels(protocol) => (Transport::Channels(protocol), answer),
            websocket::Negotiated::Tunnel => (Transport::Tunnel, answer),
        });
    }
    if !upgrade("SPDY/3.1") {
        let text = "an upgrade to SPDY/3.1 or to WebSocket is required";
        return Err(Box::new(plain(StatusCode::BAD_REQUEST, text)));
    }
    let known: &[&'static str] = if forward { &[port_forward::PROTOCOL] } else { &remote_command::SPDY_PROTOCOLS };
    let offered = words(headers, PROTOCOL);
    if offered.is_empty() {
        let text = "the header X-Stream-Protocol-Version is required";
        return Err(Box::new(plain(StatusCode::BAD_REQUEST, text)));
    }
    let Some(protocol) = offered.iter().find_map(|word| known.iter().find(|known| *known == word)).copied() else {
        let mut answer = plain(StatusCode::FORBIDDEN, "none of the protocol versions is known");
        for known in known {
            answer.headers_mut().append(ACCEPTED, HeaderValue::from_static(known));
        }
        return Err(Box::new(answer));
    };
    let mut answer = switching("SPDY/3.1");
    answer.headers_mut().insert(PROTOCOL, HeaderValue::from_static(protocol));
    Ok((Transport::Spdy(protocol), answer))
}

/// The answer that ends HTTP.
pub(super) fn switching(to: &'static str) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.headers_mut().insert(UPGRADE, HeaderValue::from_static(to));
    answer
}

/// The answer to what cannot be done.
pub(super) fn refusal(text: &str) -> Box<Answer> {
    Box::new(plain(StatusCode::BAD_REQUEST, text))
}
