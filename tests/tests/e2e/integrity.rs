//! What the host's disk has lost is an I/O error in the guest, never wrong data.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use isopod_tests::fixture::{Cri, Daemon, TestPod, shell};

/// Has the file /marked: blocks of 4096 bytes, each with its number in its first line.
const MARKED: &str = "docker.io/isopod/marked:latest";

/// Changes a byte, or changes it back.
fn flip(path: &Path, position: u64) -> anyhow::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, position)?;
    file.write_all_at(&[byte[0] ^ 0x10], position)?;
    Ok(())
}

/// The store's file in `directory` that has `text` at the start of a block, and where.
fn find(directory: &Path, text: &str) -> anyhow::Result<(PathBuf, u64)> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let bytes = fs::read(&path)?;
        if let Some(block) = bytes.chunks(4096).position(|block| block.starts_with(text.as_bytes())) {
            return Ok((path, block as u64 * 4096));
        }
    }
    anyhow::bail!("{text:?} is in no file of {}", directory.display())
}

#[tokio::test]
async fn a_flipped_byte_on_the_host_is_an_error_in_the_guest() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri: Cri = daemon.cri().await?;
    cri.pull(MARKED).await?;
    let images = daemon.directory.path().join("root/images");
    let (layer, position) = find(&images.join("layers"), "block 001500\n")?;
    flip(&layer, position + 2000)?;

    let config = |name: &str| {
        let mut config = shell(name, "sleep 1000");
        config.image.get_or_insert_default().image = MARKED.to_owned();
        config
    };
    let pod = TestPod::run_with(&cri, TestPod::config("integrity")).await?;
    let container = pod.start(config("marked")).await?;
    let read = async |block: u32| {
        let script = format!("dd if=/marked bs=4096 skip={block} count=1 2>&1 | head -n 1");
        container.sh(&script).await
    };
    for block in [0, 1499, 1501, 2047] {
        assert_eq!(read(block).await?, format!("block {block:06}\n"));
    }
    let bad = read(1500).await?;
    assert!(bad.contains("I/O error") || bad.contains("Input/output error"), "{bad}");
    let whole = container.exec(&["sh", "-c", "cat /marked > /dev/null"]).await?;
    assert!(whole.code != 0 && whole.stderr.contains("error"), "{whole:?}");
    // The disk was never wrong for the others.
    assert_eq!(container.sh("cat /unmarked").await?, "right\n");
    container.stop(0).await?;
    container.remove().await?;
    flip(&layer, position + 2000)?;

    // The superblock, in the metadata file of the only image.
    let metadata = fs::read_dir(images.join("images"))?.next().context("a metadata file")??.path();
    flip(&metadata, 1100)?;
    let error = pod.start(config("refused")).await.err().context("an image with bad metadata is mounted")?;
    let error = format!("{error:#}");
    assert!(error.contains("EROFS on"), "{error}");
    flip(&metadata, 1100)?;
    let container = pod.start(config("mended")).await?;
    assert_eq!(container.sh("cat /unmarked; tail -c 4096 /marked | head -n 1").await?, "right\nblock 002047\n");
    pod.remove().await?;
    Ok(())
}
