//! Running a command in a container to its end: with its output collected, or for a client that streams.

use std::time::Duration;

use bytes::Bytes;
use isopod_proto::ObjectId;
use isopod_proto::agent::{self, RemoveProcessRequest, SignalRequest, StreamKind};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::SandboxError;
use super::attach::resize;
use super::bring_up::Up;
use super::monitor::{self, End};
use crate::guest::{Guest, GuestError, LONG, Output, SHORT};
use crate::streaming::remote_command::Streams;
use crate::streaming::stream::{CHUNK, Incoming, Outgoing};

/// Most bytes kept of each output; what is more is dropped. Together they fit into a message.
const MAX_OUTPUT: usize = 16 * 1024 * 1024;
const SIGKILL: u32 = 9;
/// How long a command waits for its client to say how large the terminal is. Clients do so at once.
const SIZE_PATIENCE: Duration = Duration::from_millis(300);
/// How long a client waits for a command that failed to be killed and forgotten.
const CLEAN_UP_GRACE: Duration = Duration::from_secs(5);
/// How long the output may take to end after the command has, when all of it was taken.
const OUTPUT_GRACE: Duration = Duration::from_secs(5);

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The beginning of its standard output.
    pub stdout: Vec<u8>,
    /// The beginning of its standard error.
    pub stderr: Vec<u8>,
    /// 0 to 255; 128 + N for a signal N.
    pub exit_code: i32,
}

/// A command to run.
pub struct Command {
    /// In which container.
    pub container: ObjectId,
    /// As what.
    pub process: agent::Process,
    /// Longer is too long.
    pub limit: Option<Duration>,
}

/// Runs the command and answers `reply`. A client that does not wait any more, as one that sets too short a limit, has its
/// command killed.
pub async fn run(up: Up, command: Command, mut reply: oneshot::Sender<Result<Outcome, SandboxError>>) {
    let Ok(process_id) = crate::random_id() else {
        let _ = reply.send(Err(SandboxError::Ended)); // The client may have gone.
        return;
    };
    let process_id = process_id.to_string();
    let result = tokio::select! {
        result = attempt(&up, &command, &process_id) => result,
        () = reply.closed() => Err(SandboxError::Ended),
    };
    // Answered when the command is gone, or, if the guest does not say so, without it.
    let mut clean = std::pin::pin!(clean_up(&up, process_id, result.is_err()));
    let late = timeout(CLEAN_UP_GRACE, &mut clean).await.is_err();
    let _ = reply.send(result); // The client may have gone.
    if late {
        clean.await;
    }
}

/// Kills the command if it may still run, and has the guest forget it.
pub(super) async fn clean_up(up: &Up, process_id: String, may_run: bool) {
    if may_run {
        kill(up, &process_id).await;
    }
    let mut client = up.guest.client();
    let forgotten = client.remove_process(RemoveProcessRequest { process_id });
    if let Err(error) = Guest::call("RemoveProcess", SHORT, forgotten).await {
        tracing::debug!(%error, "an ended command is not forgotten by the guest");
    }
}

/// Runs the command for a client that streams; its exit code. When the client goes, the command is killed with all it started.
pub async fn interact(
    up: &Up,
    mut command: Command,
    streams: &mut Streams,
    lost: &CancellationToken,
) -> Result<i32, SandboxError> {
    let process_id = crate::random_id().map_err(|_| SandboxError::Ended)?.to_string();
    let result = tokio::select! {
        result = carry(up, &mut command, &process_id, streams) => result,
        () = lost.cancelled() => Err(SandboxError::Ended),
    };
    clean_up(up, process_id, result.is_err()).await;
    result
}

async fn carry(up: &Up, command: &mut Command, process_id: &str, streams: &mut Streams) -> Result<i32, SandboxError> {
    if let Some(sizes) = &mut streams.sizes
        && let Ok(Some(size)) = timeout(SIZE_PATIENCE, sizes.next()).await
    {
        command.process.terminal_columns = size.width.into();
        command.process.terminal_rows = size.height.into();
    }
    start(up, command, process_id).await?;
    let (stdout, stderr) = outputs(up, command.process.terminal, process_id).await?;
    let (stdin, sizes) = (streams.stdin.take(), streams.sizes.take());
    let (over, to_stdout, to_stderr) = (CancellationToken::new(), streams.stdout.as_ref(), streams.stderr.as_ref());
    let wait = async {
        let end = monitor::wait(up, process_id).await;
        over.cancel();
        end
    };
    let copy_output = async {
        let both = async {
            tokio::join!(copy_output(stdout, to_stdout), async {
                if let Some(stderr) = stderr {
                    copy_output(stderr, to_stderr).await;
                }
            })
        };
        let late = async {
            over.cancelled().await;
            sleep(OUTPUT_GRACE).await;
        };
        // Late is what a process that outlives the command writes into the same pipe.
        tokio::select! { _ = both => {}, () = late => {} }
    };
    let beside = async {
        tokio::join!(copy_input(up, process_id, stdin), resize(up, process_id, sizes));
        std::future::pending::<std::convert::Infallible>().await
    };
    let end = tokio::select! {
        (end, ()) = async { tokio::join!(wait, copy_output) } => end,
        never = beside => match never {},
    };
    match end {
        End::Exited(end) => Ok(end.exit_code),
        End::Lost(source) => Err(failed(source)),
        End::VmEnded => Err(SandboxError::VmEnded { doing: "running the command" }),
    }
}

/// Sends the client what the command writes. A client that does not read holds the command up; a stream that it does not want,
/// or any more, does not.
async fn copy_output(mut output: Output, to: Option<&Outgoing>) {
    let mut buffer = vec![0; CHUNK];
    // The VM may end: then there is no more.
    while let Ok(count @ 1..) = output.read(&mut buffer).await {
        if let Some(to) = to {
            // If it fails the client has gone, and the command is about to be killed.
            let _ = to.write(Bytes::copy_from_slice(&buffer[..count])).await;
        }
        // The end of the guest is seen by the next read.
        let _ = output.acknowledge(count as u64).await;
    }
}

/// Gives the command what the client types, and its end. A client that is lost is not an end.
async fn copy_input(up: &Up, process_id: &str, stdin: Option<Incoming>) {
    let Some(mut stdin) = stdin else { return };
    let mut input = match up.guest.input(process_id).await {
        Ok(input) => input,
        Err(error) => return tracing::debug!(%error, "a command has no input"),
    };
    while let Ok(bytes) = stdin.read().await {
        let Some(bytes) = bytes else {
            let _ = input.finish().await; // The command may have ended.
            return;
        };
        // A command that reads no more does not mind what else comes.
        if input.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn attempt(up: &Up, command: &Command, process_id: &str) -> Result<Outcome, SandboxError> {
    let work = async {
        start(up, command, process_id).await?;
        let (stdout, stderr) = outputs(up, command.process.terminal, process_id).await?;
        let (stdout, stderr) = (Collected::start(stdout), stderr.map(Collected::start));
        let end = match monitor::wait(up, process_id).await {
            End::Exited(end) => end,
            End::Lost(source) => return Err(failed(source)),
            End::VmEnded => return Err(SandboxError::VmEnded { doing: "running the command" }),
        };
        let stderr = match stderr {
            Some(stderr) => stderr.finish().await,
            None => Vec::new(),
        };
        Ok(Outcome { stdout: stdout.finish().await, stderr, exit_code: end.exit_code })
    };
    match command.limit {
        None => work.await,
        Some(limit) => timeout(limit, work)
            .await
            .map_err(|_| SandboxError::Late { what: "the end of the command", seconds: limit.as_secs() })?,
    }
}

fn failed(source: GuestError) -> SandboxError {
    SandboxError::Guest { doing: "cannot run the command", source }
}

async fn start(up: &Up, command: &Command, process_id: &str) -> Result<(), SandboxError> {
    let mut client = up.guest.client();
    let request = agent::ExecRequest {
        container_id: command.container.to_string(),
        process_id: process_id.to_owned(),
        process: Some(command.process.clone()),
    };
    Guest::call("Exec", LONG, client.exec(request)).await.map(drop).map_err(failed)
}

/// Standard output and error, or the terminal's output alone.
async fn outputs(up: &Up, terminal: bool, process_id: &str) -> Result<(Output, Option<Output>), SandboxError> {
    if terminal {
        return Ok((up.guest.output(process_id, StreamKind::TerminalOutput, 0).await.map_err(failed)?, None));
    }
    let stdout = up.guest.output(process_id, StreamKind::Stdout, 0).await.map_err(failed)?;
    Ok((stdout, Some(up.guest.output(process_id, StreamKind::Stderr, 0).await.map_err(failed)?)))
}

/// An output that is being read. Dropping it ends the reading.
struct Collected(JoinHandle<Vec<u8>>);

impl Collected {
    fn start(mut output: Output) -> Self {
        Self(tokio::spawn(async move {
            let mut kept = Vec::new();
            let mut buffer = vec![0; 32 * 1024];
            // The VM may end: then there is no more.
            while let Ok(count @ 1..) = output.read(&mut buffer).await {
                let room = MAX_OUTPUT - kept.len();
                kept.extend_from_slice(&buffer[..count.min(room)]);
                // The end of the guest is seen by the next read.
                let _ = output.acknowledge(count as u64).await;
            }
            kept
        }))
    }

    async fn finish(mut self) -> Vec<u8> {
        // All was acknowledged before the end was known, unless a process that outlives the command holds the pipe.
        match timeout(Duration::from_secs(2), &mut self.0).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(_)) | Err(_) => Vec::new(),
        }
    }
}

impl Drop for Collected {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn kill(up: &Up, process_id: &str) {
    let mut client = up.guest.client();
    let request = SignalRequest { process_id: process_id.to_owned(), signal: SIGKILL, all: true };
    // It may not have been started, or have ended.
    if Guest::call("Signal", SHORT, client.signal(request)).await.is_ok()
        && timeout(SHORT, monitor::wait(up, process_id)).await.is_err()
    {
        tracing::warn!(process_id, "a killed command does not end");
    }
}
