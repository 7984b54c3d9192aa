//! Exec, attach and port-forward with the real crictl, over SPDY and over WebSocket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use isopod_cri_server::cri;
use isopod_tests::fixture::{Cri, LogLine, TestPod, eventually, shell};
use tonic::Code;

const PATIENCE: Duration = Duration::from_secs(60);
const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

fn crictl(arguments: &[&str]) -> Command {
    let mut command = Command::new("crictl");
    command.args(["-t", "120s"]).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs crictl to its end, with this input.
async fn run(arguments: &[&str], input: &[u8]) -> anyhow::Result<Output> {
    let mut child = crictl(arguments).stdin(Stdio::piped()).spawn()?;
    let (mut stdin, input) = (child.stdin.take().context("piped")?, input.to_vec());
    let work = tokio::task::spawn_blocking(move || {
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output();
        let _ = writer.join(); // A command may end without having read all.
        output
    });
    Ok(tokio::time::timeout(PATIENCE * 2, work).await.context("crictl does not end")???)
}

/// Runs `crictl` with `command` in a terminal of 101 columns and 33 rows, and types `input`; what is shown.
async fn in_terminal(crictl: &str, command: &str, input: &str) -> anyhow::Result<String> {
    let words = format!("stty cols 101 rows 33; exec {crictl} {command}");
    let mut child = Command::new("script")
        .args(["-qec", &words, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run script")?;
    let (mut stdin, mut stdout) = (child.stdin.take().context("piped")?, child.stdout.take().context("piped")?);
    let input = input.to_owned();
    let work = tokio::task::spawn_blocking(move || -> anyhow::Result<String> {
        stdin.write_all(input.as_bytes())?;
        let mut shown = Vec::new();
        stdout.read_to_end(&mut shown)?;
        // Closed only now: its end would be typed as well.
        drop(stdin);
        child.wait()?;
        Ok(text(&shown))
    });
    tokio::time::timeout(PATIENCE * 2, work).await.context("the terminal does not end")??
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Bytes that are not the same anywhere.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

#[tokio::test]
async fn a_command_has_output_input_terminal_and_exit_code_over_both_transports() -> anyhow::Result<()> {
    let pod = TestPod::run("stream").await?;
    let container = pod.start(shell("stream", "sleep 1000")).await?;
    for transport in TRANSPORTS {
        let exec = async |options: &[&str], command: &[&str], input: &[u8]| {
            let arguments = [&["exec", "--transport", transport], options, &[container.id.as_str()], command].concat();
            run(&arguments, input).await
        };
        let output = exec(&[], &["sh", "-c", "echo out; echo err >&2"], b"").await?;
        assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("out\n", Some(0)), "{output:?}");
        assert!(text(&output.stderr).contains("err\n"), "{output:?}");

        let output = exec(&[], &["sh", "-c", "echo before; exit 42"], b"").await?;
        assert_eq!(text(&output.stdout), "before\n");
        assert!(!output.status.success() && text(&output.stderr).contains("42"), "{output:?}");

        // Ends only if the end of the input arrives.
        let output = exec(&["-i"], &["sh", "-c", "cat; echo end"], b"typed\n").await?;
        assert_eq!(text(&output.stdout), "typed\nend\n", "{output:?}");

        let words = format!("crictl -t 120s exec -it --transport {transport} {}", container.id);
        let output =
            in_terminal(&words, "sh -c 'stty size; tty; echo err >&2; read a; echo got $a'", "typed\n").await?;
        for wanted in ["33 101", "/dev/pts/", "err", "got typed"] {
            assert!(output.contains(wanted), "{wanted:?}: {output:?}");
        }

        let output = exec(&[], &["/no/such/command"], b"").await?;
        assert!(!output.status.success() && text(&output.stderr).contains("/no/such/command"), "{output:?}");
    }
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn eight_megabytes_go_both_ways_at_once_whole() -> anyhow::Result<()> {
    let pod = TestPod::run("volume").await?;
    let container = pod.start(shell("volume", "sleep 1000")).await?;
    let input = noise(8 << 20);
    // Two at once, one over each transport.
    let echo = async |transport| run(&["exec", "-i", "--transport", transport, &container.id, "cat"], &input).await;
    let (spdy, websocket) = tokio::join!(echo("spdy"), echo("websocket"));
    for output in [spdy?, websocket?] {
        ensure!(output.stdout == input, "{} bytes came back: {}", output.stdout.len(), text(&output.stderr));
    }
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_command_whose_client_goes_is_killed() -> anyhow::Result<()> {
    let pod = TestPod::run("gone").await?;
    let container = pod.start(shell("gone", "sleep 1000")).await?;
    // One waits for input, the other is held up by a client that does not read.
    let script = "echo up; sleep 3001";
    let mut child = crictl(&["exec", "-i", &container.id, "sh", "-c", script]).stdin(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.take().context("piped")?;
    let read = tokio::task::spawn_blocking(move || BufReader::new(stdout).read_line(&mut line).map(|_| line));
    assert_eq!(tokio::time::timeout(PATIENCE, read).await???, "up\n");
    let mut stalled = crictl(&["exec", &container.id, "sh", "-c", "yes; sleep 3001"]).spawn()?;
    eventually("the second command", PATIENCE, async || {
        container.sh("ps").await.ok().filter(|ps| ps.contains("yes")).map(drop)
    })
    .await?;
    child.kill()?;
    stalled.kill()?;
    child.wait()?;
    stalled.wait()?;
    eventually("end of the commands", PATIENCE, async || {
        let ps = container.sh("ps").await.ok()?;
        (!ps.contains("sleep 3001") && !ps.contains("yes")).then_some(())
    })
    .await?;
    pod.remove().await?;
    Ok(())
}

/// An attached crictl whose output is read line by line.
struct Attached {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Attached {
    fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut child = crictl(&[&["attach"], arguments].concat()).stdin(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("piped")?;
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines })
    }

    async fn until(&self, wanted: &str) -> anyhow::Result<()> {
        eventually(wanted, PATIENCE, async || self.lines.try_iter().any(|line| line.trim_end() == wanted).then_some(()))
            .await
    }

    fn send(&mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.child.stdin.as_mut().context("piped")?.write_all(text.as_bytes())?)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn several_attach_at_once_and_the_input_ends_with_the_first_that_has_it() -> anyhow::Result<()> {
    let pod = TestPod::run("attach").await?;
    let mut config = shell("attach", "while true; do echo tick; sleep 1; done & cat; kill $!; echo end");
    (config.stdin, config.stdin_once) = (true, true);
    let container = pod.start(config).await?;
    let first = Attached::start(&[&container.id])?;
    first.until("tick").await?;
    let mut second = Attached::start(&["-i", "--transport", "websocket", &container.id])?;
    second.until("tick").await?;
    second.send("typed\n")?;
    first.until("typed").await?;
    second.until("typed").await?;
    drop(second.child.stdin.take());
    first.until("end").await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    // The log has every line, whoever else got it.
    let lines: Vec<String> = container.logs()?.iter().map(LogLine::text).collect();
    assert!(lines.contains(&"typed\n".to_owned()) && lines.last().is_some_and(|line| line == "end\n"), "{lines:?}");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn ports_of_a_pod_are_forwarded_over_both_transports_and_both_addresses() -> anyhow::Result<()> {
    let pod = TestPod::run("forward").await?;
    // Servers on either loopback address alone, and nothing on the third port.
    let script = "mkdir /www; head -c 3000000 /dev/zero | tr '\\0' x > /www/index.html; \
        httpd -p 127.0.0.1:8081 -h /www; httpd -p '[::1]:8082' -h /www; echo up; sleep 1000";
    let container = pod.start(shell("forward", script)).await?;
    container.logged("the servers", PATIENCE, |lines| !lines.is_empty()).await?;
    for (number, transport) in TRANSPORTS.into_iter().enumerate() {
        let local = 21_000 + 10 * number as u16;
        let ports: Vec<String> = (1..=3).map(|port| format!("{}:{}", local + port, 8080 + port)).collect();
        let arguments = ["port-forward", "--transport", transport, &pod.id, &ports[0], &ports[1], &ports[2]];
        let mut child = crictl(&arguments).spawn()?;
        let result = async {
            // It listens on one after the other. A connection to the last one would end the session, as nobody takes it.
            for port in [1, 2] {
                eventually("forwarded port", PATIENCE, async || TcpStream::connect(("127.0.0.1", local + port)).ok())
                    .await?;
            }
            let mut tasks = Vec::new();
            for port in [1, 2, 1, 2] {
                tasks.push(tokio::task::spawn_blocking(move || fetch(local + port)));
            }
            for task in tasks {
                let body = tokio::time::timeout(PATIENCE, task).await.context("it takes too long")???;
                ensure!(body.len() == 3_000_000 && body.iter().all(|byte| *byte == b'x'), "{} bytes", body.len());
            }
            // Where nobody listens the connection is closed without a byte.
            let nothing = tokio::task::spawn_blocking(move || fetch(local + 3));
            ensure!(tokio::time::timeout(PATIENCE, nothing).await??.map_or(true, |body| body.is_empty()));
            anyhow::Ok(())
        };
        let result = result.await;
        let _ = child.kill();
        let output = child.wait_with_output()?;
        result.with_context(|| format!("{transport}: {}", text(&output.stderr)))?;
    }
    pod.remove().await?;
    Ok(())
}

/// The body of a web server's main page.
fn fetch(port: u16) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    Ok(answer.split_off(head))
}

#[tokio::test]
async fn what_cannot_be_streamed_is_refused_and_a_url_is_good_once() -> anyhow::Result<()> {
    let pod = TestPod::run("refused").await?;
    let container = pod.create(shell("refused", "sleep 1000")).await?;
    let mut runtime = Cri::shared().await?.runtime;
    let exec = cri::ExecRequest {
        container_id: container.id.clone(),
        cmd: vec!["true".to_owned()],
        stdout: true,
        ..Default::default()
    };
    let refused = runtime.exec(exec.clone()).await.expect_err("it does not run");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    container.start().await?;
    let both = cri::ExecRequest { tty: true, stderr: true, ..exec.clone() };
    assert_eq!(runtime.exec(both).await.expect_err("tty and stderr").code(), Code::InvalidArgument);
    let none = cri::ExecRequest { stdout: false, ..exec.clone() };
    assert_eq!(runtime.exec(none).await.expect_err("no stream").code(), Code::InvalidArgument);
    let unknown = cri::ExecRequest { container_id: "nothing".to_owned(), ..exec.clone() };
    assert_eq!(runtime.exec(unknown).await.expect_err("unknown").code(), Code::NotFound);
    let attach =
        cri::AttachRequest { container_id: container.id.clone(), tty: true, stdout: true, ..Default::default() };
    assert_eq!(runtime.attach(attach).await.expect_err("no terminal").code(), Code::InvalidArgument);
    let forward = cri::PortForwardRequest { pod_sandbox_id: "nothing".to_owned(), port: Vec::new() };
    assert_eq!(runtime.port_forward(forward).await.expect_err("unknown").code(), Code::NotFound);

    let url = runtime.exec(exec).await?.into_inner().url;
    let rest = url.strip_prefix("http://127.0.0.1:").context("a URL on loopback")?.to_owned();
    let (port, path) = rest.split_once('/').context("a path")?;
    let status = |path: &str, headers: &str| -> anyhow::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port.parse()?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "POST /{path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line.split(' ').nth(1).unwrap_or_default().to_owned())
    };
    let spdy = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";
    assert_eq!(status("exec/AAAAAAAAAAAAAAAAAAAAAA", spdy)?, "404");
    assert_eq!(status(path, spdy)?, "101");
    assert_eq!(status(path, spdy)?, "404");
    pod.remove().await?;
    Ok(())
}
