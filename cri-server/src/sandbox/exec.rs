//! Running a command in a container to its end.

use std::time::Duration;

use isopod_proto::ObjectId;
use isopod_proto::agent::{self, RemoveProcessRequest, SignalRequest, StreamKind};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::SandboxError;
use super::bring_up::Up;
use super::monitor::{self, End};
use crate::guest::{Guest, LONG, Output, SHORT};

/// Most bytes kept of each output; what is more is dropped. Together they fit into a message.
const MAX_OUTPUT: usize = 16 * 1024 * 1024;
const SIGKILL: u32 = 9;

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
    if result.is_err() {
        kill(&up, &process_id).await;
    }
    let mut client = up.guest.client();
    let forgotten = client.remove_process(RemoveProcessRequest { process_id });
    if let Err(error) = Guest::call("RemoveProcess", SHORT, forgotten).await {
        tracing::debug!(%error, "an ended command is not forgotten by the guest");
    }
    let _ = reply.send(result); // The client may have gone.
}

async fn attempt(up: &Up, command: &Command, process_id: &str) -> Result<Outcome, SandboxError> {
    let failed = |source| SandboxError::Guest { doing: "cannot run the command", source };
    let mut client = up.guest.client();
    let request = agent::ExecRequest {
        container_id: command.container.to_string(),
        process_id: process_id.to_owned(),
        process: Some(command.process.clone()),
    };
    Guest::call("Exec", LONG, client.exec(request)).await.map_err(failed)?;
    let work = async {
        let (stdout, stderr) = if command.process.terminal {
            (up.guest.output(process_id, StreamKind::TerminalOutput, 0).await.map_err(failed)?, None)
        } else {
            let stdout = up.guest.output(process_id, StreamKind::Stdout, 0).await.map_err(failed)?;
            (stdout, Some(up.guest.output(process_id, StreamKind::Stderr, 0).await.map_err(failed)?))
        };
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
