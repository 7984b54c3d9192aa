//! Following a container's process: its output into the log, and its end to the driver.

use std::sync::Arc;
use std::time::Duration;

use isopod_proto::ErrorKind;
use isopod_proto::agent::{StreamKind, WaitProcessRequest, WaitProcessResponse};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::bring_up::Up;
use crate::container::log::{ContainerLog, Lines, LogStream};
use crate::guest::{Guest, GuestError};

/// How long the log may take to be complete after the VM's end.
const LOG_GRACE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How the wait for a process ended.
pub enum End {
    /// So it exited.
    Exited(WaitProcessResponse),
    /// The agent does not know it any more, or talks nonsense, so nobody will ever know how it ended.
    Lost(GuestError),
    /// The VM ended first.
    VmEnded,
}

/// Copies the output of `process` into `log` and waits for its end. The log is complete when this returns.
pub async fn follow(up: Up, process: String, terminal: bool, log: Arc<ContainerLog>) -> End {
    let streams: &[(StreamKind, LogStream)] = if terminal {
        &[(StreamKind::TerminalOutput, LogStream::Stdout)]
    } else {
        &[(StreamKind::Stdout, LogStream::Stdout), (StreamKind::Stderr, LogStream::Stderr)]
    };
    let mut copies = JoinSet::new();
    for (kind, stream) in streams {
        copies.spawn(copy(up.clone(), process.clone(), *kind, *stream, Arc::clone(&log)));
    }
    let end = wait(&up, &process).await;
    match &end {
        // The agent answers after every byte is acknowledged, which is after it is in the log: nothing is left to copy.
        End::Exited(_) => {}
        // What is on its way in the sockets.
        End::Lost(_) | End::VmEnded => {
            let complete = async { while copies.join_next().await.is_some() {} };
            if timeout(LOG_GRACE, complete).await.is_err() {
                tracing::warn!(process, "the output of a container did not end with it");
            }
        }
    }
    end
}

/// Copies one stream to its end, over as many connections as that takes while the VM lives.
async fn copy(up: Up, process: String, kind: StreamKind, stream: LogStream, log: Arc<ContainerLog>) {
    let mut taken = log.taken(stream);
    let mut lines = Lines::default();
    let mut pause = FIRST_PAUSE;
    loop {
        match up.guest.output(&process, kind, taken).await {
            Ok(mut output) => {
                // What is not taken comes again.
                lines = Lines::default();
                let result = log.copy(&mut output, stream, &mut lines).await;
                // What is in the log, whether or not the guest was told.
                let before = std::mem::replace(&mut taken, log.taken(stream));
                if taken > before {
                    pause = FIRST_PAUSE;
                }
                match result {
                    Ok(()) => return,
                    Err(error) => tracing::debug!(%error, ?stream, taken, "an output stream is interrupted"),
                }
            }
            Err(error @ GuestError::Refused { .. }) => {
                tracing::warn!(%error, ?stream, "the guest does not give the output of a container");
                return;
            }
            Err(error) => tracing::debug!(%error, ?stream, "an output stream cannot be opened"),
        }
        tokio::select! {
            () = sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            _ = up.vm.ended() => {
                // There will never be more than this.
                log.finish(taken, stream, &mut lines);
                return;
            }
        }
    }
}

/// Waits for the end of a process, or of the VM.
pub async fn wait(up: &Up, process: &str) -> End {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut client = up.guest.client();
        let request = WaitProcessRequest { process_id: process.to_owned() };
        // The end of a process has no deadline; the end of its VM is seen.
        let answer = tokio::select! {
            answer = client.wait_process(request) => answer,
            _ = up.vm.ended() => return End::VmEnded,
        };
        let error = match Guest::call("WaitProcess", Duration::MAX, std::future::ready(answer)).await {
            Ok(end) if (0..=255).contains(&end.exit_code) => return End::Exited(end),
            Ok(end) => {
                let what = format!("the exit code {}, which there is not", end.exit_code);
                return End::Lost(GuestError::Impossible { call: "WaitProcess", what });
            }
            Err(error) => error,
        };
        if !passing(&error) {
            tracing::error!(process, %error, "the guest does not know the process");
            return End::Lost(error);
        }
        tokio::select! {
            () = sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            _ = up.vm.ended() => return End::VmEnded,
        }
    }
}

fn passing(error: &GuestError) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::DeadlineExceeded | ErrorKind::Internal)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use isopod_proto::agent::{StreamOpen, StreamOpened};
    use isopod_proto::{MAX_STREAM_HEADER, decode_frame, encode_frame};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};

    use super::*;
    use crate::vmm::{VSOCK_SOCKET, Vm};

    /// Takes the daemon's line and its StreamOpen, and answers both.
    async fn accept_stream(listener: &UnixListener) -> (UnixStream, StreamOpen) {
        let (mut stream, _) = listener.accept().await.expect("the daemon");
        while stream.read_u8().await.expect("a line") != b'\n' {}
        stream.write_all(b"OK 1\n").await.expect("written");
        let mut bytes = Vec::new();
        let open = loop {
            stream.read_buf(&mut bytes).await.expect("a StreamOpen");
            if let Some((open, _)) = decode_frame(&bytes, MAX_STREAM_HEADER).expect("a frame") {
                break open;
            }
        };
        stream.write_all(&encode_frame(&StreamOpened::default())).await.expect("written");
        (stream, open)
    }

    /// A guest whose VM is a process that only sleeps.
    fn up(directory: &Path) -> (Up, std::process::Child) {
        let child = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        let vm = Vm::of_process(child.id() as i32, directory);
        (Up { vm: Arc::new(vm), guest: Guest::new(directory.join(VSOCK_SOCKET)) }, child)
    }

    #[tokio::test]
    async fn an_interrupted_stream_goes_on_where_the_log_ends() {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(directory.path().join(VSOCK_SOCKET)).expect("bound");
        let (up, mut child) = up(directory.path());
        let path = directory.path().join("0.log");
        let log = Arc::new(ContainerLog::open(Some(path.clone()), &directory.path().join("p")).expect("opened"));
        let copied = tokio::spawn(copy(up, "x".into(), StreamKind::Stdout, LogStream::Stdout, log));

        // The daemon cannot connect at first.
        drop(listener.accept().await.expect("the daemon"));
        let (mut stream, open) = accept_stream(&listener).await;
        assert_eq!(open.offset, 0);
        stream.write_all(b"one\ntw").await.expect("written");
        stream.readable().await.expect("an acknowledgement");
        // With bytes unread in it, the connection is reset, not ended.
        drop(stream);
        let (mut stream, open) = accept_stream(&listener).await;
        assert_eq!(open.offset, 4);
        stream.write_all(b"two\n").await.expect("written");
        stream.shutdown().await.expect("ended");
        timeout(Duration::from_secs(20), copied).await.expect("in time").expect("no panic");
        let text = std::fs::read_to_string(&path).expect("text");
        let words: Vec<_> = text.lines().map(|line| line.rsplit(' ').next().unwrap_or_default()).collect();
        assert_eq!(words, ["one", "two"]);
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    #[tokio::test]
    async fn the_line_that_was_cut_by_the_end_of_the_vm_is_in_the_log() {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(directory.path().join(VSOCK_SOCKET)).expect("bound");
        let (up, mut child) = up(directory.path());
        let path = directory.path().join("0.log");
        let log = Arc::new(ContainerLog::open(Some(path.clone()), &directory.path().join("p")).expect("opened"));
        let copied = tokio::spawn(copy(up, "x".into(), StreamKind::Stdout, LogStream::Stdout, log));
        let (mut stream, _) = accept_stream(&listener).await;
        stream.write_all(b"one\ntw").await.expect("written");
        stream.readable().await.expect("an acknowledgement");
        drop((listener, stream));
        child.kill().expect("killed");
        child.wait().expect("reaped");
        timeout(Duration::from_secs(20), copied).await.expect("in time").expect("no panic");
        assert!(std::fs::read_to_string(&path).expect("text").ends_with(" stdout P tw\n"));
    }
}
