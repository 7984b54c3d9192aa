//! `isopod image`: with a daemon and without one.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::Context;
use isopod_tests::fixture::{Daemon, eventually, repository};
use rustix::process::Signal;

const NAME: &str = "imported.example/busybox:1";

/// Runs `isopod image` with the daemon's configuration, `input` being its standard input.
fn isopod(daemon: &Daemon, arguments: &[&str], input: &[u8]) -> anyhow::Result<Output> {
    let mut child = Command::new(repository()?.join("out/isopod"))
        .args(["--config".as_ref(), daemon.directory.path().join("config.toml").as_os_str()])
        .arg("image")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // A program that has seen enough closes it.
    let _ = child.stdin.take().context("piped")?.write_all(input);
    Ok(child.wait_with_output()?)
}

/// The same for what must succeed; gives what it printed.
fn good(daemon: &Daemon, arguments: &[&str], input: &[u8]) -> anyhow::Result<String> {
    let output = isopod(daemon, arguments, input)?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{arguments:?}: {said}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Copies the test image busybox with skopeo.
fn copy(target: &str) -> anyhow::Result<()> {
    let source = format!("oci:{}:busybox", repository()?.join("out/images").display());
    let output = Command::new("skopeo").args(["--insecure-policy", "copy", "-q", &source, target]).output()?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path of plain characters")
}

#[tokio::test]
async fn archives_are_imported_and_images_listed_pulled_and_removed() -> anyhow::Result<()> {
    let mut daemon = Daemon::start(|_| {}).await?;
    let cri = daemon.cri().await?;
    let (saved, layout) = (daemon.directory.path().join("saved.tar"), daemon.directory.path().join("layout"));
    copy(&format!("docker-archive:{}:{NAME}", saved.display()))?;
    copy(&format!("oci:{}:7", layout.display()))?;
    let archive = std::fs::read(&saved)?;

    // Half of it is told and leaves nothing.
    let output = isopod(&daemon, &["import", "-"], &archive[..archive.len() / 2])?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("stream ends"), "{said}");
    assert_eq!(cri.image(NAME).await?, None);

    // docker save's form from standard input, a layout's directory: the image that a pull gives.
    let imported = good(&daemon, &["import", "-"], &archive)?;
    let image = cri.image(NAME).await?.context("it is there")?;
    assert_eq!(imported, format!("{} {NAME}\n", image.id));
    good(&daemon, &["import", "--name", "imported.example/layout", text(&layout)?], b"")?;
    let pulled = good(&daemon, &["pull", "docker.io/library/busybox"], b"")?;
    assert_eq!(pulled.trim_end(), image.id);
    let listed = good(&daemon, &["ls"], b"")?;
    for name in [NAME, "imported.example/layout:7", "docker.io/library/busybox:latest"] {
        assert!(listed.contains(name), "{listed}");
    }
    good(&daemon, &["rm", NAME], b"")?;
    assert_eq!(cri.image(&image.id).await?, None);

    // Without a daemon, the store itself.
    daemon.end(Signal::TERM).await?;
    assert_eq!(good(&daemon, &["import", text(&saved)?], b"")?, imported);
    assert!(good(&daemon, &["ls"], b"")?.contains(NAME));
    daemon.restart().await?;
    assert_eq!(daemon.cri().await?.image(NAME).await?.map(|found| found.id), Some(image.id));
    Ok(())
}

#[tokio::test]
async fn images_of_the_configured_directory_are_there_after_the_start_and_pinned() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    copy(&format!("docker-archive:{}:{NAME}", directory.path().join("1.tar").display()))?;
    std::fs::write(directory.path().join("0.tar"), "no archive")?;
    let mut daemon = Daemon::start(|config| {
        let images = config.entry("images").or_insert_with(|| toml::Table::new().into());
        images
            .as_table_mut()
            .expect("a section")
            .insert("preload".into(), text(directory.path()).expect("text").into());
    })
    .await?;
    let cri = daemon.cri().await?;
    let limit = Duration::from_secs(60);
    // It is there a moment before it is pinned, which is when all of its file is there.
    let pinned = async || cri.image(NAME).await.ok().flatten().filter(|image| image.pinned);
    eventually("preloaded, pinned image", limit, pinned).await?;
    let log = daemon.log();
    assert!(log.contains("0.tar") && log.contains("images are not preloaded"), "{log}");
    daemon.end(Signal::TERM).await?;
    Ok(())
}
