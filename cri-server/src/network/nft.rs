//! Running nft, the program of nftables. A script is one transaction: all of it holds, or nothing of it.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use super::NetworkError;
use crate::tools;

const DEADLINE: Duration = Duration::from_secs(20);
/// Most characters of what nft says that an error shows.
const SHOWN: usize = 500;

/// Runs `script` in the network namespace of the calling thread.
pub async fn run(script: String) -> Result<(), NetworkError> {
    let failed = |problem: String| NetworkError::Nft { problem };
    let program = tools::find("nft").ok_or_else(|| failed("the program nft is not installed".to_owned()))?;
    let mut child = Command::new(program)
        .args(["-f", "-"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("nft does not start: {error}")))?;
    let mut input = child.stdin.take().expect("it was asked for");
    let work = async move {
        // If nft ends before it has read all, its message says why.
        let _ = input.write_all(script.as_bytes()).await;
        drop(input);
        child.wait_with_output().await
    };
    let output = timeout(DEADLINE, work)
        .await
        .map_err(|_| failed(format!("nft did not end within {} s", DEADLINE.as_secs())))?
        .map_err(|error| failed(format!("nft: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(failed(format!("nft: {}", message.trim().chars().take(SHOWN).collect::<String>())))
}
