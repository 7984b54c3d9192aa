//! Sparse files with an ext4 file system, for guests to write on: copies of templates that are made once.
//!
//! The host never mounts one.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use isopod_proto::ErrorKind;

use crate::tools;

/// What the names of templates begin with.
pub const TEMPLATE: &str = "template-";

/// A file system that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// A file system call failed.
    #[error("cannot {doing} the file system {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// mkfs.ext4 failed.
    #[error("cannot make the template {path} of file systems: {problem}")]
    Format {
        /// Which file.
        path: PathBuf,
        /// What it said.
        problem: String,
    },
}

impl Ext4Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => ErrorKind::ResourceExhausted,
            Self::Io { .. } => ErrorKind::Internal,
            Self::Format { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

/// A file system as it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its size.
    pub bytes: u64,
    /// With a journal it is whole whenever its VM ends; without one it is not worth anything after that.
    pub journal: bool,
}

impl Kind {
    /// The template's name in the directory of templates.
    fn name(self) -> String {
        let journal = if self.journal { "-journal" } else { "" };
        format!("{TEMPLATE}{}{journal}.ext4", self.bytes)
    }

    /// Makes the template in the directory `templates`, unless it is there. Blocks.
    pub fn prepare(self, templates: &Path) -> Result<PathBuf, Ext4Error> {
        let template = templates.join(self.name());
        if !template.exists() {
            make_template(&template, self)?;
        }
        Ok(template)
    }

    /// Makes a file system at `path`, where nothing is yet. Blocks.
    pub fn make(self, templates: &Path, path: &Path) -> Result<File, Ext4Error> {
        let template = self.prepare(templates)?;
        let failed = |doing| move |source| Ext4Error::Io { doing, path: path.to_owned(), source };
        let mut source = File::open(&template).map_err(failed("copy the template to"))?;
        let target = File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
        let mut target = target.map_err(failed("make"))?;
        copy_data(&mut source, &mut target, self.bytes).map_err(failed("copy the template to"))?;
        Ok(target)
    }
}

/// Makes the template under another name first, so that one under its name is whole.
fn make_template(path: &Path, kind: Kind) -> Result<(), Ext4Error> {
    let failed = |doing| move |source| Ext4Error::Io { doing, path: path.to_owned(), source };
    let format = |problem: String| Ext4Error::Format { path: path.into(), problem };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed("make the directory of"))?;
    }
    let temporary = path.with_extension("new");
    let file = File::create(&temporary).map_err(failed("make"))?;
    file.set_len(kind.bytes).map_err(failed("size"))?;
    let program = tools::find("mkfs.ext4").ok_or_else(|| format("mkfs.ext4 is not installed".to_owned()))?;
    let journal: &[&str] = if kind.journal { &["-J", "size=4"] } else { &["-O", "^has_journal"] };
    // The file is all holes, so that nothing need be zeroed, by mkfs or later by the guest's kernel. All of it is for the
    // containers: no blocks for root.
    let output = Command::new(program)
        .args(["-q", "-F", "-m", "0"])
        .args(journal)
        .args(["-E", "lazy_itable_init=1,assume_storage_prezeroed=1,root_owner=0:0"])
        .arg(&temporary)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format(format!("mkfs.ext4 does not start: {error}")))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(format(message.trim().chars().take(500).collect()));
    }
    file.sync_all().map_err(failed("write"))?;
    std::fs::rename(&temporary, path).map_err(failed("name"))
}

/// Copies what is not a hole.
fn copy_data(source: &mut File, target: &mut File, bytes: u64) -> io::Result<()> {
    target.set_len(bytes)?;
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&*source, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&*source, rustix::fs::SeekFrom::Hole(start))?;
        source.seek(SeekFrom::Start(start))?;
        target.seek(SeekFrom::Start(start))?;
        copy_nonzero(&mut source.take(end - start), target)?;
        at = end;
        if at >= bytes {
            break;
        }
    }
    Ok(())
}

/// A file system without holes says that all is data: zeroes are left out nevertheless.
fn copy_nonzero(source: &mut impl Read, target: &mut File) -> io::Result<()> {
    let mut block = vec![0; 64 * 1024];
    loop {
        let mut length = 0;
        while length < block.len() {
            match source.read(&mut block[length..])? {
                0 => break,
                count => length += count,
            }
        }
        if length == 0 {
            return Ok(());
        }
        if block[..length].iter().any(|byte| *byte != 0) {
            target.write_all(&block[..length])?;
        } else {
            target.seek_relative(length as i64)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_has_the_templates_bytes_and_its_holes() {
        let (mut source, mut target) = (tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file"));
        let bytes = 64 << 20;
        source.set_len(bytes).expect("sized");
        source.seek(SeekFrom::Start(5 << 20)).expect("there");
        source.write_all(b"superblock").expect("written");
        copy_data(&mut source, &mut target, bytes).expect("copied");
        let metadata = target.metadata().expect("there");
        assert_eq!(metadata.len(), bytes);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
        let mut read = [0; 10];
        std::os::unix::fs::FileExt::read_exact_at(&target, &mut read, 5 << 20).expect("read");
        assert_eq!(&read, b"superblock");
    }
}
