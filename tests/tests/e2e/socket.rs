//! Who can open the CRI socket.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use isopod_tests::fixture::{Daemon, setting};

/// A group that has no name on the node.
const GROUP: u32 = 4321;

/// Mode, user and group.
fn access(path: &Path) -> anyhow::Result<(u32, u32, u32)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()))
}

/// Whether a user that is not root, with the only group `group`, gets an answer at the socket.
fn answers(socket: &Path, group: u32) -> anyhow::Result<bool> {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", &format!("--regid={group}"), "--clear-groups", "crictl", "--runtime-endpoint"]);
    Ok(command.arg(format!("unix://{}", socket.display())).arg("version").output()?.status.success())
}

#[tokio::test]
async fn the_socket_is_roots_and_of_the_group_that_is_configured() -> anyhow::Result<()> {
    let shared = setting("ISOPOD_SOCKET")?;
    assert_eq!(access(shared.as_ref())?, (0o600, 0, 0));
    for directory in ["/run/isopod", "/var/lib/isopod"] {
        assert_eq!(access(directory.as_ref())?, (0o700, 0, 0), "{directory}");
    }
    assert!(!answers(shared.as_ref(), 0)?);

    let daemon = Daemon::start(|config| {
        config.insert("socket".into(), "unix:///run/isopod-of-a-group.sock".into());
        config.insert("socket_group".into(), i64::from(GROUP).into());
    })
    .await?;
    assert_eq!(access(&daemon.socket)?, (0o660, 0, GROUP));
    assert_eq!(access(&daemon.state)?, (0o700, 0, 0));
    assert!(answers(&daemon.socket, GROUP)?);
    assert!(!answers(&daemon.socket, GROUP + 1)?);
    Ok(())
}
