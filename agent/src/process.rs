//! A process of a container: its streams, its end, and how to signal it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use isopod_proto::agent::StreamKind;
use rustix::termios::Winsize;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::error::{Context as _, Error, Result};
use crate::launch;
use crate::reaper::Exit;
use crate::stream::{self, AsyncFile, Input, Output, Target};
use crate::stub::message::Descriptor;
use crate::sys;

/// How a process ended, for the daemon.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Its status and time.
    pub exit: Exit,
    /// The OOM killer killed something in its cgroup while it lived.
    pub oom_killed: bool,
}

/// A process that was asked for by the daemon.
pub struct Process {
    /// Its id in the protocol.
    pub id: String,
    /// The container it is in.
    pub container_id: String,
    /// The cgroup of the process and of all it starts: the container's, or, for a further process, one below it.
    pub cgroup: Arc<Cgroup>,
    /// Its input, if it has one.
    pub input: Option<Arc<Input>>,
    outputs: Vec<(StreamKind, Arc<Output>)>,
    terminal: Option<Arc<AsyncFile>>,
    pidfd: Option<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// Our ends of a process's standard streams.
pub struct Streams {
    input: Option<Target>,
    outputs: Vec<(StreamKind, Arc<AsyncFile>)>,
}

/// The process's ends of its standard streams.
pub type Ends = Vec<(Descriptor, OwnedFd)>;

impl Streams {
    /// Pipes for a process without a terminal, and the ends that it gets.
    pub fn pipes(with_input: bool) -> Result<(Self, Ends)> {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(|| "make a pipe");
        let (input, stdin) = if with_input {
            let (reader, writer) = pipe()?;
            (Some(Target::Pipe(Arc::new(stream::register(writer)?))), reader)
        } else {
            (None, launch::null()?)
        };
        let (stdout, stdout_end) = pipe()?;
        let (stderr, stderr_end) = pipe()?;
        let outputs = vec![
            (StreamKind::Stdout, Arc::new(stream::register(stdout)?)),
            (StreamKind::Stderr, Arc::new(stream::register(stderr)?)),
        ];
        let ends = vec![(Descriptor::Stdin, stdin), (Descriptor::Stdout, stdout_end), (Descriptor::Stderr, stderr_end)];
        Ok((Self { input, outputs }, ends))
    }

    /// The one stream in both directions of a process with the terminal `master`.
    pub fn terminal(master: OwnedFd, with_input: bool) -> Result<Self> {
        let master = Arc::new(stream::register(master)?);
        let input = with_input.then(|| Target::Terminal(Arc::clone(&master)));
        Ok(Self { input, outputs: vec![(StreamKind::TerminalOutput, master)] })
    }
}

/// Where the end of a process is announced: at once, and together with what the cgroup says about it.
pub struct Ending {
    exit: watch::Sender<Option<Exit>>,
    outcome: watch::Sender<Option<Outcome>>,
    input: Option<Arc<Input>>,
    oom_kills_before: u64,
}

impl Ending {
    /// The process has ended.
    pub fn announce(&self, exit: Exit, cgroup: &Cgroup) {
        if let Some(input) = &self.input {
            input.close();
        }
        let oom_killed = cgroup.oom_kills() > self.oom_kills_before;
        self.exit.send_replace(Some(exit));
        self.outcome.send_replace(Some(Outcome { exit, oom_killed }));
    }
}

impl Process {
    /// The process with these ids, whose output is read from now on. `oom_kills_before` is the container's count at its start.
    pub fn new(
        id: &str,
        container_id: &str,
        pidfd: Option<OwnedFd>,
        streams: Streams,
        cgroup: Arc<Cgroup>,
        oom_kills_before: u64,
    ) -> (Arc<Self>, Ending) {
        let (exit_sender, exit) = watch::channel(None);
        let (outcome_sender, outcome) = watch::channel(None);
        let mut outputs = Vec::new();
        let mut terminal = None;
        for (kind, source) in streams.outputs {
            let output = Arc::new(Output::default());
            if kind == StreamKind::TerminalOutput {
                terminal = Some(Arc::clone(&source));
            }
            // The task ends with the stream; after the process's exit that is certain to come.
            tokio::spawn(Arc::clone(&output).pump(source, exit.clone()));
            outputs.push((kind, output));
        }
        let input = streams.input.map(|target| Arc::new(Input::new(target)));
        let ending = Ending { exit: exit_sender, outcome: outcome_sender, input: input.clone(), oom_kills_before };
        let (id, container_id) = (id.to_owned(), container_id.to_owned());
        (Arc::new(Self { id, container_id, cgroup, input, outputs, terminal, pidfd, exit, outcome }), ending)
    }

    /// The output stream of this kind.
    pub fn output(&self, kind: StreamKind) -> Option<Arc<Output>> {
        self.outputs.iter().find(|(this, _)| *this == kind).map(|(_, output)| Arc::clone(output))
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        // The sender goes only after it has announced the end.
        let _ = self.exit.clone().wait_for(Option::is_some).await;
    }

    /// Waits until it has ended and all its output is acknowledged.
    pub async fn finished(&self) -> Result<Outcome> {
        let mut outcome = self.outcome.clone();
        let outcome = match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => *outcome,
            Err(_) => None,
        };
        let outcome = outcome.ok_or_else(|| Error::not_found(format!("process {} was removed", self.id)))?;
        for (_, output) in &self.outputs {
            output.drained().await;
        }
        Ok(outcome)
    }

    /// Its pidfd, as long as it lives.
    pub fn pidfd(&self) -> Result<&OwnedFd> {
        let ended = || Error::precondition(format!("process {} has ended", self.id));
        if self.has_ended() { Err(ended()) } else { self.pidfd.as_ref().ok_or_else(ended) }
    }

    /// Sends it `signal`. A process that has just ended cannot be signalled.
    pub fn signal(&self, signal: i32) -> Result<()> {
        sys::pidfd_send_signal(self.pidfd()?.as_fd(), signal)
            .context(|| format!("send signal {signal} to process {}", self.id))
            .map_err(|error| match self.has_ended() {
                true => error.with_kind(isopod_proto::ErrorKind::FailedPrecondition),
                false => error,
            })
    }

    /// Drops what is kept of its output: the daemon does not want it any more.
    pub fn abandon_output(&self) {
        for (_, output) in &self.outputs {
            output.abandon();
        }
    }

    /// Kills it, if it still lives.
    pub fn kill(&self) {
        launch::kill(self.pidfd.as_ref());
    }

    /// Sets the size of its terminal.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<()> {
        let (Ok(columns), Ok(rows)) = (u16::try_from(columns), u16::try_from(rows)) else {
            return Err(Error::invalid(format!("a terminal cannot be {columns} by {rows}")));
        };
        let no_terminal = || Error::precondition(format!("process {} has no terminal", self.id));
        let terminal = self.terminal.as_ref().ok_or_else(no_terminal)?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal.get_ref(), size)
            .context(|| format!("set the terminal of process {} to {columns} by {rows}", self.id))
    }
}
