//! Masquerading of what pods send out of their subnet, by an nftables table of our own.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use super::NetworkError;
use crate::config::NetworkConfig;
use crate::tools;

const DEADLINE: Duration = Duration::from_secs(10);

/// Replaces the table with one for `config`, in one transaction.
pub async fn set(config: &NetworkConfig) -> Result<(), NetworkError> {
    let failed = |problem: String| NetworkError::Masquerade { problem };
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
        let _ = input.write_all(rules(config).as_bytes()).await;
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
    Err(failed(format!("nft: {}", message.trim().chars().take(500).collect::<String>())))
}

fn rules(config: &NetworkConfig) -> String {
    let NetworkConfig { bridge, subnet, prefix, .. } = config;
    // Naming the table before deleting it makes the deletion valid where there is none.
    format!(
        "table ip isopod\n\
         delete table ip isopod\n\
         table ip isopod {{\n\
         \tchain postrouting {{\n\
         \t\ttype nat hook postrouting priority 100; policy accept;\n\
         \t\tip saddr {subnet}/{prefix} ip daddr != {subnet}/{prefix} oifname != \"{bridge}\" masquerade\n\
         \t}}\n\
         }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_name_the_subnet_and_the_bridge() {
        let rules = rules(&crate::config::Config::check(Default::default()).expect("the default").network);
        assert!(rules.contains("ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 oifname != \"isopod0\" masquerade"));
        assert!(rules.find("delete table").expect("replaced") < rules.find("chain").expect("made"));
    }
}
