//! Exec and attach over WebSocket in the sub-protocols that crictl does not speak, with a client of the tests' own.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use isopod_cri_server::cri;
use isopod_tests::fixture::{Cri, TestContainer, TestPod, shell};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::ClientRequestBuilder;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};

const PATIENCE: Duration = Duration::from_secs(60);
const STDIN: u8 = 0;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// One of the sub-protocols.
#[derive(Clone, Copy, Debug)]
struct Protocol {
    /// Empty: the client names none.
    name: &'static str,
    base64: bool,
    /// The outcome is JSON; otherwise it is text, of failures only.
    json: bool,
}

const V5: Protocol = Protocol { name: "v5.channel.k8s.io", base64: false, json: true };
const PROTOCOLS: [Protocol; 6] = [
    V5,
    Protocol { name: "v4.channel.k8s.io", ..V5 },
    Protocol { name: "v4.base64.channel.k8s.io", base64: true, ..V5 },
    Protocol { name: "channel.k8s.io", base64: false, json: false },
    Protocol { name: "base64.channel.k8s.io", base64: true, json: false },
    Protocol { name: "", base64: false, json: false },
];

/// A URL at which a command runs in a container.
pub async fn exec_url(container: &TestContainer, command: &[&str], stdin: bool, tty: bool) -> anyhow::Result<String> {
    let cmd = command.iter().map(|&word| word.to_owned()).collect();
    let container_id = container.id.clone();
    let request = cri::ExecRequest { container_id, cmd, stdin, stdout: true, stderr: !tty, tty };
    Ok(container.cri.runtime.clone().exec(request).await?.into_inner().url)
}

/// A connection to the server of a URL; the URL without its scheme.
pub async fn connect(url: &str) -> anyhow::Result<(TcpStream, &str)> {
    let rest = url.strip_prefix("http://").context("not a URL of HTTP")?;
    let (address, _) = rest.split_once('/').context("a URL without a path")?;
    Ok((TcpStream::connect(address).await?, rest))
}

/// A client's side of a session.
pub struct Session {
    /// The connection.
    pub socket: WebSocketStream<TcpStream>,
    protocol: Protocol,
    /// What came on stdout, stderr and the error channel.
    channels: [Vec<u8>; 3],
}

impl Session {
    /// Connects to a URL with version 5 of the protocol.
    pub async fn start(url: &str) -> anyhow::Result<Self> {
        Self::start_as(url, V5).await
    }

    async fn start_as(url: &str, protocol: Protocol) -> anyhow::Result<Self> {
        let (stream, rest) = connect(url).await?;
        let mut request = ClientRequestBuilder::new(format!("ws://{rest}").parse()?);
        if !protocol.name.is_empty() {
            request = request.with_sub_protocol(protocol.name);
        }
        let (socket, answer) = timeout(PATIENCE, tokio_tungstenite::client_async(request, stream)).await??;
        let agreed = answer.headers().get("sec-websocket-protocol").map(|name| name.as_bytes()).unwrap_or_default();
        ensure!(agreed == protocol.name.as_bytes(), "{answer:?}");
        Ok(Self { socket, protocol, channels: Default::default() })
    }

    /// Sends bytes on a channel.
    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> anyhow::Result<()> {
        let message = if self.protocol.base64 {
            Message::text(format!("{channel}{}", STANDARD.encode(bytes)))
        } else {
            Message::binary([&[channel], bytes].concat())
        };
        Ok(timeout(PATIENCE, self.socket.send(message)).await??)
    }

    /// Takes the next message; false if the session has ended as it should.
    async fn take(&mut self) -> anyhow::Result<bool> {
        let message = timeout(PATIENCE, self.socket.next()).await.context("nothing comes")?;
        let (channel, bytes) = match message.context("the connection ends without a word")?? {
            Message::Binary(bytes) if !self.protocol.base64 => {
                let (channel, bytes) = bytes.split_first().context("an empty message")?;
                (*channel, bytes.to_vec())
            }
            Message::Text(text) if self.protocol.base64 => {
                let (channel, bytes) = text.split_at_checked(1).context("an empty message")?;
                (channel.parse()?, STANDARD.decode(bytes)?)
            }
            Message::Close(Some(frame)) if frame.code == CloseCode::Normal => return Ok(false),
            other => bail!("{other:?} is not of the protocol"),
        };
        let place = usize::from(channel).checked_sub(1).and_then(|number| self.channels.get_mut(number));
        place.with_context(|| format!("channel {channel}"))?.extend(bytes);
        Ok(true)
    }

    /// Reads until stdout has `wanted`.
    pub async fn until(&mut self, wanted: &str) -> anyhow::Result<()> {
        while !self.text(0).contains(wanted) {
            ensure!(self.take().await?, "{wanted:?} is not in {:?}", self.text(0));
        }
        Ok(())
    }

    /// Reads to the end: stdout, stderr and the outcome.
    async fn end(mut self) -> anyhow::Result<[String; 3]> {
        while self.take().await? {}
        Ok([0, 1, 2].map(|number| self.text(number)))
    }

    fn text(&self, number: usize) -> String {
        String::from_utf8_lossy(&self.channels[number]).into_owned()
    }
}

#[tokio::test]
async fn each_sub_protocol_has_input_both_outputs_and_the_exit_code() -> anyhow::Result<()> {
    let pod = TestPod::run("channels").await?;
    let container = pod.start(shell("channels", "sleep 1000")).await?;
    for protocol in PROTOCOLS {
        let case = async {
            let script = "read line; echo got $line; echo err >&2; exit 3";
            let mut session =
                Session::start_as(&exec_url(&container, &["sh", "-c", script], true, false).await?, protocol).await?;
            session.send(STDIN, b"ty").await?;
            session.send(STDIN, b"ped\n").await?;
            let [stdout, stderr, outcome] = session.end().await?;
            ensure!((stdout.as_str(), stderr.as_str()) == ("got typed\n", "err\n"), "{stdout:?} {stderr:?}");
            if protocol.json {
                let outcome: serde_json::Value = serde_json::from_str(&outcome)?;
                ensure!(outcome["status"] == "Failure" && outcome["reason"] == "NonZeroExitCode", "{outcome}");
                let code = serde_json::json!([{"reason": "ExitCode", "message": "3"}]);
                ensure!(outcome["details"]["causes"] == code, "{outcome}");
            } else {
                ensure!(outcome == "command terminated with non-zero exit code: exit status 3", "{outcome:?}");
            }

            // Without input, and with success. A byte that is no text goes through as it is.
            let url = exec_url(&container, &["printf", "a\\377b"], false, false).await?;
            let mut session = Session::start_as(&url, protocol).await?;
            while session.take().await? {}
            ensure!(session.channels[0] == b"a\xffb", "{:?}", session.channels[0]);
            if protocol.json {
                let outcome: serde_json::Value = serde_json::from_slice(&session.channels[2])?;
                ensure!(outcome["status"] == "Success", "{outcome}");
            } else {
                ensure!(session.channels[2].is_empty(), "{:?}", session.text(2));
            }
            anyhow::Ok(())
        };
        case.await.with_context(|| format!("{protocol:?}"))?;
    }

    // Version 5 tells the end of the input, and `cat` ends with it. In version 4 channel 255 means nothing.
    let command = ["sh", "-c", "cat; echo end"];
    let mut session = Session::start(&exec_url(&container, &command, true, false).await?).await?;
    session.send(STDIN, b"typed\n").await?;
    session.send(CLOSE, &[STDIN]).await?;
    assert_eq!(session.end().await?[0], "typed\nend\n");
    let url = exec_url(&container, &command, true, false).await?;
    let mut session = Session::start_as(&url, PROTOCOLS[1]).await?;
    session.send(CLOSE, &[STDIN]).await?;
    session.send(STDIN, b"typed\n").await?;
    session.until("typed\n").await?;
    drop(session);

    // A terminal: its size comes on channel 4, before the command and while it runs.
    let script = "stty size; until stty size | grep '20 60'; do sleep 1; done";
    let url = exec_url(&container, &["sh", "-c", script], true, true).await?;
    let mut session = Session::start_as(&url, PROTOCOLS[1]).await?;
    session.send(RESIZE, br#"{"Width":77,"Height":44}"#).await?;
    session.until("44 77").await?;
    session.send(RESIZE, br#"{"Width":60,"Height":20}"#).await?;
    let [stdout, _, outcome] = session.end().await?;
    assert!(stdout.contains("20 60") && outcome.contains("Success"), "{stdout:?} {outcome:?}");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn attach_and_refusals_over_websocket() -> anyhow::Result<()> {
    let pod = TestPod::run("ws-attach").await?;
    let mut config = shell("ws-attach", "while read line; do echo got $line; echo err >&2; done; exit 5");
    (config.stdin, config.stdin_once) = (true, true);
    let container = pod.start(config).await?;
    let mut runtime = Cri::shared().await?.runtime;
    let mut attach = async || {
        let request = cri::AttachRequest {
            container_id: container.id.clone(),
            stdin: true,
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        anyhow::Ok(runtime.attach(request).await?.into_inner().url)
    };

    // What is not known is refused, whatever else is right, and so is a port-forward's protocol here.
    for offered in ["v6.channel.k8s.io", "chat", "SPDY/3.1+portforward.k8s.io", "V4.CHANNEL.K8S.IO"] {
        let url = attach().await?;
        let refused = |error: Error| match error {
            Error::Http(answer) => Some(answer.status().as_u16()),
            _ => None,
        };
        let offer = async |name| {
            let (stream, rest) = connect(&url).await?;
            let request = ClientRequestBuilder::new(format!("ws://{rest}").parse()?).with_sub_protocol(name);
            anyhow::Ok(
                timeout(PATIENCE, tokio_tungstenite::client_async(request, stream)).await?.map(drop).map_err(refused),
            )
        };
        assert_eq!(offer(offered).await?, Err(Some(400)), "{offered}");
        // A refusal has used the URL up.
        assert_eq!(offer("v4.channel.k8s.io").await?, Err(Some(404)), "{offered}");
    }

    // Two clients with different sub-protocols get the same.
    let mut first = Session::start_as(&attach().await?, PROTOCOLS[1]).await?;
    let mut second = Session::start_as(&attach().await?, PROTOCOLS[4]).await?;
    // Nothing tells when a client is attached, but what it gets.
    for attempt in 0.. {
        ensure!(attempt < 30, "no output comes");
        first.send(STDIN, b"one\n").await?;
        if timeout(Duration::from_secs(2), second.until("got one\n")).await.is_ok_and(|came| came.is_ok()) {
            break;
        }
    }
    first.until("got one\n").await?;
    second.send(STDIN, b"two\n").await?;
    second.until("got two\n").await?;
    first.until("got two\n").await?;
    // The end of the input, which only version 5 can tell, ends the container, and that its clients' sessions.
    let mut third = Session::start(&attach().await?).await?;
    third.send(CLOSE, &[STDIN]).await?;
    assert_eq!(container.exited().await?.exit_code, 5);
    let [stdout, stderr, outcome] = second.end().await?;
    assert!(stdout.ends_with("got one\ngot two\n") && stderr.ends_with("err\nerr\n"), "{stdout:?} {stderr:?}");
    assert_eq!(outcome, "");
    assert!(first.end().await?[2].contains("Success"));
    pod.remove().await?;
    Ok(())
}
