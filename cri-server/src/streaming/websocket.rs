//! WebSocket (RFC 6455): messages with a channel's number before their bytes, as Kubernetes defines them, and SPDY in messages.
//!
//! Source: `k8s.io/apimachinery/pkg/util/remotecommand` (versions and channels) and the behaviour of client-go's
//! `tools/remotecommand/websocket.go` and `transport/websocket`.

mod channels;
mod tunnel;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::Full;
use hyper::header::{HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION};
use hyper::{HeaderMap, Response};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use super::http::{refusal, switching};

pub use channels::{forward, serve};
pub use tunnel::tunnel;

const SUBPROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");
/// SPDY in the messages of a WebSocket.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Most bytes of a message of the client.
const MAX_MESSAGE: usize = 1024 * 1024;

/// How channels are written, and what the error channel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Its name; empty if the client names none.
    pub name: &'static str,
    /// Messages are text: the channel's digit and base64.
    pub base64: bool,
    /// The outcome is JSON.
    pub json: bool,
    /// Channel 255 tells which channel the client has closed.
    pub close: bool,
}

/// The versions, the best one first.
pub(crate) const PROTOCOLS: [Protocol; 5] = [
    Protocol { name: "v5.channel.k8s.io", base64: false, json: true, close: true },
    Protocol { name: "v4.channel.k8s.io", base64: false, json: true, close: false },
    Protocol { name: "v4.base64.channel.k8s.io", base64: true, json: true, close: false },
    Protocol { name: "channel.k8s.io", base64: false, json: false, close: false },
    Protocol { name: "base64.channel.k8s.io", base64: true, json: false, close: false },
];
/// For a client that names none.
const UNNAMED: Protocol = Protocol { name: "", base64: false, json: false, close: false };

/// What was agreed upon.
pub enum Negotiated {
    /// Channels.
    Channels(Protocol),
    /// SPDY in messages.
    Tunnel,
}

type Answer = Response<Full<bytes::Bytes>>;

/// Chooses the protocol and answers the handshake. `forward`: the session is a port-forward.
pub fn negotiate(headers: &HeaderMap, forward: bool) -> Result<(Negotiated, Answer), Box<Answer>> {
    let key = headers.get(SEC_WEBSOCKET_KEY).filter(|key| STANDARD.decode(key).is_ok_and(|key| key.len() == 16));
    let key = key.ok_or_else(|| refusal("the header Sec-WebSocket-Key is missing or wrong"))?;
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(refusal("only version 13 of WebSocket is understood"));
    }
    let offered = super::http::words(headers, SUBPROTOCOL);
    let (negotiated, name) = if offered.is_empty() {
        (Negotiated::Channels(UNNAMED), "")
    } else if forward && offered.contains(&TUNNEL) {
        (Negotiated::Tunnel, TUNNEL)
    } else {
        let known = offered.iter().find_map(|word| PROTOCOLS.iter().find(|known| known.name == *word));
        // Version 5 has no port-forward of its own.
        let known = known.filter(|known| !(forward && known.close));
        let known = known.ok_or_else(|| refusal("none of the subprotocols is known"))?;
        (Negotiated::Channels(*known), known.name)
    };
    let mut answer = switching("websocket");
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()));
    let accept = accept.map_err(|_| refusal("the header Sec-WebSocket-Key is wrong"))?;
    answer.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    if !name.is_empty() {
        answer.headers_mut().insert(SUBPROTOCOL, HeaderValue::from_static(name));
    }
    Ok((negotiated, answer))
}

/// Limits on what a client sends.
fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .read_buffer_size(super::stream::CHUNK)
        .write_buffer_size(0)
}
