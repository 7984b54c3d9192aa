//! Following a container's process: its output into the log, and its end to the driver.

use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ErrorKind;
use isopod_proto::agent::{StreamKind, WaitProcessRequest, WaitProcessResponse};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::bring_up::Up;
use crate::container::log::{ContainerLog, LogStream};
use crate::guest::{Guest, GuestError};

/// How long the log may take to be complete after the process's end is known.
const LOG_GRACE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Copies the output of `process` into `log` and waits for its end. The log is complete when this returns. None: the VM
/// ended first.
pub async fn follow(up: Up, process: String, terminal: bool, log: Arc<ContainerLog>) -> Option<WaitProcessResponse> {
    let streams: &[(StreamKind, LogStream)] = if terminal {
        &[(StreamKind::TerminalOutput, LogStream::Stdout)]
    } else {
        &[(StreamKind::Stdout, LogStream::Stdout), (StreamKind::Stderr, LogStream::Stderr)]
    };
    let mut copies = JoinSet::new();
    for (kind, stream) in streams {
        match up.guest.output(&process, *kind, log.taken(*stream)).await {
            Ok(output) => {
                copies.spawn(Arc::clone(&log).copy(output, *stream));
            }
            Err(error) => tracing::warn!(%error, stream = ?stream, "the output of a container is not to be had"),
        }
    }
    let end = wait(&up, &process).await;
    let complete = async { while copies.join_next().await.is_some() {} };
    if timeout(LOG_GRACE, complete).await.is_err() {
        tracing::warn!(process, "the output of a container did not end with it");
    }
    end
}

/// Waits for the end of a process, or of the VM.
pub async fn wait(up: &Up, process: &str) -> Option<WaitProcessResponse> {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut client = up.guest.client();
        let request = WaitProcessRequest { process_id: process.to_owned() };
        // The end of a process has no deadline; the end of its VM is seen.
        let answer = tokio::select! {
            answer = client.wait_process(request) => answer,
            _ = up.vm.ended() => return None,
        };
        let error = match Guest::call("WaitProcess", Duration::MAX, std::future::ready(answer)).await {
            Ok(end) => return Some(end),
            Err(error) => error,
        };
        if !passing(&error) {
            // The agent has lost it, so nobody will ever know more.
            tracing::error!(process, %error, "the guest does not know the process");
            return Some(WaitProcessResponse {
                exit_code: crate::container::KILLED,
                signal: 0,
                oom_killed: false,
                finished_at_nanos: super::now(),
            });
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            _ = up.vm.ended() => return None,
        }
    }
}

fn passing(error: &GuestError) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::DeadlineExceeded | ErrorKind::Internal)
}
