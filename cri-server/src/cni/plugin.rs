//! Running a plugin (section 2): parameters in its environment, its configuration on stdin, its result on stdout.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Child;
use tokio::time::timeout;

use super::{Attachment, CniError, INTERFACE};

/// Most bytes a plugin may print, on stdout and on stderr.
const MAX_OUTPUT: u64 = 1024 * 1024;
/// Most characters of what a plugin says that an error shows.
const SHOWN: usize = 1000;
/// How long a killed plugin may take to end.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// Error code "try again later".
const AGAIN: u64 = 11;
/// Where plugins find the programs that they run, such as iptables.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a plugin is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
}

impl Command {
    fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
        }
    }
}

/// A call of a plugin.
pub struct Call<'a> {
    /// What it is to do.
    pub command: Command,
    /// With what; none for what is about the whole network.
    pub attachment: Option<&'a Attachment>,
}

/// How plugins are run.
#[derive(Clone, Debug)]
pub struct Runner {
    /// Where they are, in the order to look.
    pub directories: Vec<PathBuf>,
    /// What each call may take.
    pub deadline: Duration,
}

/// What a plugin prints when it fails (section 5, "Error").
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Failure {
    code: u64,
    msg: String,
    details: String,
}

impl Runner {
    /// The path of a plugin.
    pub fn find(&self, plugin: &str) -> Result<PathBuf, CniError> {
        let paths = self.directories.iter().map(|directory| directory.join(plugin));
        paths
            .into_iter()
            .find(|path| path.is_file())
            .ok_or_else(|| CniError::NotInstalled { plugin: plugin.to_owned(), directories: self.directories.clone() })
    }

    /// Runs a plugin to its end; what it printed on stdout.
    pub async fn run(&self, plugin: &str, call: &Call<'_>, request: &Map<String, Value>) -> Result<Vec<u8>, CniError> {
        let command = call.command.as_str();
        let failed = |message: String, again| CniError::Plugin { plugin: plugin.to_owned(), command, message, again };
        let path = self.find(plugin)?;
        let mut process = tokio::process::Command::new(&path);
        process.env_clear().envs(self.environment(call)).process_group(0).kill_on_drop(true);
        process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            process.spawn().map_err(|error| failed(format!("{} does not start: {error}", path.display()), false))?;
        let input = serde_json::to_vec(request).expect("it has only string keys");
        let talked = timeout(self.deadline, talk(&mut child, input)).await;
        let (status, stdout, stderr) = match talked {
            Ok(Ok(Some(ended))) => ended,
            Ok(Ok(None)) => {
                kill(child).await;
                return Err(CniError::Flood { plugin: plugin.to_owned(), command, limit: MAX_OUTPUT });
            }
            Ok(Err(error)) => {
                kill(child).await;
                return Err(failed(error.to_string(), false));
            }
            Err(_) => {
                kill(child).await;
                let seconds = self.deadline.as_secs();
                return Err(CniError::Late { plugin: plugin.to_owned(), command, seconds });
            }
        };
        if status.success() {
            return Ok(stdout);
        }
        let (message, again) = match serde_json::from_slice::<Failure>(&stdout) {
            Ok(failure) if !failure.msg.is_empty() || failure.code != 0 => {
                let details = if failure.details.is_empty() { String::new() } else { format!("; {}", failure.details) };
                (format!("{}{details} (code {})", failure.msg, failure.code), failure.code == AGAIN)
            }
            Ok(_) | Err(_) => (format!("{status}; {}", String::from_utf8_lossy(&stderr).trim()), false),
        };
        Err(failed(message.chars().take(SHOWN).collect(), again))
    }

    fn environment(&self, call: &Call<'_>) -> Vec<(&'static str, String)> {
        let directories: Vec<_> = self.directories.iter().map(|path| path.display().to_string()).collect();
        let mut variables = vec![
            ("PATH", PATH.to_owned()),
            ("CNI_COMMAND", call.command.as_str().to_owned()),
            ("CNI_PATH", directories.join(":")),
        ];
        if let Some(attachment) = call.attachment {
            // A namespace that is gone has no path; only DEL is called without one.
            let namespace = Some(&attachment.namespace).filter(|path| path.exists());
            variables.extend([
                ("CNI_CONTAINERID", attachment.sandbox.to_string()),
                ("CNI_NETNS", namespace.map(|path| path.display().to_string()).unwrap_or_default()),
                ("CNI_IFNAME", INTERFACE.to_owned()),
                ("CNI_ARGS", attachment.arguments.clone()),
            ]);
        }
        variables
    }
}

/// How a plugin ended, its stdout and its stderr.
type Ended = (std::process::ExitStatus, Vec<u8>, Vec<u8>);

/// Gives the plugin its input and takes what it prints, until it ends. None: it printed too much.
async fn talk(child: &mut Child, input: Vec<u8>) -> std::io::Result<Option<Ended>> {
    let mut stdin = child.stdin.take().expect("it was asked for");
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let write = async move {
        // A plugin may end before it has read all, and then says why.
        let _ = stdin.write_all(&input).await;
        Ok(())
    };
    let (_, stdout, stderr) = match tokio::try_join!(write, read(stdout), read(stderr)) {
        Ok(done) => done,
        Err(error) if error.kind() == std::io::ErrorKind::FileTooLarge => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some((child.wait().await?, stdout, stderr)))
}

async fn read(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let Some(stream) = stream else { return Ok(bytes) };
    stream.take(MAX_OUTPUT + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > MAX_OUTPUT { Err(std::io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}

/// Kills a plugin and what it has started.
async fn kill(mut child: Child) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
        // It is its group's leader, and not reaped yet, so the group is its.
        let _ = kill_process_group(pid, Signal::KILL); // It may just have ended.
    }
    if timeout(KILL_GRACE, child.wait()).await.is_err() {
        tracing::warn!(pid = child.id(), "a killed CNI plugin does not end");
    }
}
