//! Port-forward: each connection that the client has accepted is a pair of streams, one for data and one for an error.
//!
//! Source: the behaviour of client-go's `tools/portforward`. The agent makes the connection to the port, in the guest.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use isopod_proto::ObjectId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;

use super::spdy::Stream;
use super::stream::{CHUNK, Incoming, Lost, Outgoing};
use crate::grpc::status::chain;
use crate::guest::Guest;
use crate::runtime::Runtime;
use crate::sandbox::command::Command;

/// The protocol's name.
pub const PROTOCOL: &str = "portforward.k8s.io";
/// How long the second stream of a pair may take to follow the first.
const PAIR_TIMEOUT: Duration = Duration::from_secs(30);
/// How often pairs are checked for that.
const PAIR_CHECK: Duration = Duration::from_secs(5);

/// One forwarded connection.
struct Pair {
    port: u16,
    data: Stream,
    error: Stream,
}

/// The streams whose other half has not come, by the id of their request.
#[derive(Default)]
struct Halves(HashMap<String, (Instant, Stream)>);

impl Halves {
    /// Adds a stream; the pair, if it is whole now.
    fn add(&mut self, stream: Stream) -> Option<Pair> {
        // A client that gives no id, as old ones, opens the data stream right after the error stream.
        let id = match (stream.header("requestid"), stream.header("streamtype")) {
            ("", "data") => stream.id.saturating_sub(2).to_string(),
            ("", _) => stream.id.to_string(),
            (id, _) => id.to_owned(),
        };
        let Some((_, other)) = self.0.remove(&id) else {
            self.0.insert(id, (Instant::now(), stream));
            return None;
        };
        let (data, error) = if stream.header("streamtype") == "data" { (stream, other) } else { (other, stream) };
        let kinds = (data.header("streamtype"), error.header("streamtype"));
        let port = data.header("port").parse().ok().filter(|port| *port != 0)?;
        // Anything else is dropped, with which its client finds both closed at the end of the session.
        (kinds == ("data", "error")).then_some(Pair { port, data, error })
    }

    fn expire(&mut self) {
        self.0.retain(|_, (since, _)| since.elapsed() < PAIR_TIMEOUT);
    }
}

/// Forwards connections until the client or the sandbox goes.
pub async fn run(runtime: &Runtime, sandbox: ObjectId, mut opened: mpsc::Receiver<Stream>, lost: CancellationToken) {
    let up = match runtime.ask(&sandbox, Command::OpenPorts).await {
        Ok(up) => up,
        Err(error) => {
            tracing::info!(error = chain(&error), "no port is forwarded");
            lost.cancel();
            return;
        }
    };
    // Dropped, and with it all its connections, when the session ends.
    let mut connections = JoinSet::new();
    let mut halves = Halves::default();
    let mut check = interval(PAIR_CHECK);
    loop {
        tokio::select! {
            stream = opened.recv() => match stream {
                Some(stream) => if let Some(pair) = halves.add(stream) {
                    connections.spawn(forward(up.guest.clone(), pair));
                },
                None => return,
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            _ = check.tick() => halves.expire(),
            () = lost.cancelled() => return,
            _ = up.vm.ended() => {
                lost.cancel();
                return;
            }
        }
    }
}

async fn forward(guest: Guest, pair: Pair) {
    let Pair { port, data, error } = pair;
    let result = relay(&guest, port, data.incoming, data.outgoing).await;
    if let Err(message) = result {
        tracing::debug!(port, message, "a forwarded connection failed");
        let _ = error.outgoing.write(message.into()).await; // The client may have gone.
    }
    let _ = error.outgoing.finish().await; // As above.
    // The streams' places are free only now.
    drop((data.place, error.place));
}

/// Connects to `port` in the guest and carries bytes until both directions have ended, or either side has gone. The error is
/// for the client.
pub async fn relay(guest: &Guest, port: u16, mut from: Incoming, to: Outgoing) -> Result<(), String> {
    let target = match guest.tcp(port).await {
        Ok(target) => target,
        Err(error) => {
            let _ = to.finish().await; // The client may have gone.
            return Err(chain(&error));
        }
    };
    let (mut from_target, mut to_target) = target.into_split();
    let upload = async {
        while let Some(bytes) = from.read().await? {
            // A server that reads no more may still answer.
            if to_target.write_all(&bytes).await.is_err() {
                return Ok(());
            }
        }
        // It may have closed.
        let _ = to_target.shutdown().await;
        Ok::<_, Lost>(())
    };
    let download = async {
        let mut buffer = vec![0; CHUNK];
        // A connection that is reset ends as well.
        while let Ok(count @ 1..) = from_target.read(&mut buffer).await {
            to.write(Bytes::copy_from_slice(&buffer[..count])).await?;
        }
        to.finish().await
    };
    // The client has gone: so does the connection.
    let _ = tokio::try_join!(upload, download);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    fn stream(id: u32, headers: &[(&str, &str)]) -> Stream {
        let (messages, _) = mpsc::channel(1);
        Stream {
            id,
            headers: headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            incoming: Incoming::new().1,
            outgoing: Outgoing::new(messages, id),
            place: Arc::new(Semaphore::new(1)).try_acquire_owned().expect("free"),
        }
    }

    #[tokio::test]
    async fn streams_of_a_request_are_a_pair_in_either_order() {
        let mut halves = Halves::default();
        let headers = |kind| [("streamtype", kind), ("port", "80"), ("requestid", "0")];
        assert!(halves.add(stream(3, &headers("data"))).is_none());
        let pair = halves.add(stream(1, &headers("error"))).expect("both are there");
        assert_eq!((pair.port, pair.data.id, pair.error.id), (80, 3, 1));
        assert!(halves.add(stream(5, &headers("error"))).is_none());
        assert!(halves.add(stream(7, &headers("error"))).is_none());
        assert!(halves.0.is_empty());
    }

    #[tokio::test]
    async fn without_a_request_id_the_stream_before_is_the_other_half() {
        let mut halves = Halves::default();
        assert!(halves.add(stream(1, &[("streamtype", "error"), ("port", "80")])).is_none());
        assert!(halves.add(stream(3, &[("streamtype", "data"), ("port", "80")])).is_some());
        assert!(halves.add(stream(5, &[("streamtype", "error"), ("port", "x")])).is_none());
        assert!(halves.add(stream(7, &[("streamtype", "data"), ("port", "70000")])).is_none());
    }
}
