//! How far a log is, kept in a small file beside it, so that a later daemon goes on at that very byte, wherever the earlier one was
//! killed.
//!
//! The record is written before the entries it speaks of. Whether those are in the log is told by the log's length: all of
//! them, none, or, if the kill came in the middle of the write, some, which are then taken back. So nothing is lost or doubled.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Bytes of stdout and of stderr that are in a log.
pub type Taken = [u64; 2];

/// What the file holds: numbers of 8 bytes, little endian. `taken`, then, if a write was begun, `inode`, `size`, `length` and `after`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is in the log without the write.
    pub taken: Taken,
    /// The last write, unless it is known that it is over.
    pub begun: Option<Begun>,
}

/// A write to a log that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Of the log's file, which may have another name by now.
    pub inode: u64,
    /// The log's length before it.
    pub size: u64,
    /// Bytes to be written.
    pub length: u64,
    /// What is in the log with it.
    pub after: Taken,
}

const NUMBERS: usize = 7;

impl Progress {
    fn encode(self) -> Vec<u8> {
        let [stdout, stderr] = self.taken;
        let begun = self.begun.unwrap_or(Begun { inode: 0, size: 0, length: 0, after: self.taken });
        let numbers = [stdout, stderr, begun.inode, begun.size, begun.length, begun.after[0], begun.after[1]];
        numbers.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    /// A file that is too short is a new one, or one of an earlier version, which had `taken` alone.
    fn decode(bytes: &[u8]) -> Self {
        let mut numbers = [0; NUMBERS];
        for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
            *number = u64::from_le_bytes(*bytes);
        }
        let [stdout, stderr, inode, size, length, after_stdout, after_stderr] = numbers;
        let begun = Begun { inode, size, length, after: [after_stdout, after_stderr] };
        Self { taken: [stdout, stderr], begun: (inode != 0).then_some(begun) }
    }

    /// Finds out what is in the log, and takes back a part of a write. `log` is where it should be.
    fn settle(self, log: &Path) -> io::Result<Taken> {
        let Some(begun) = self.begun else { return Ok(self.taken) };
        // What has been rotated away and removed was written before that.
        let Some(file) = with_inode(log, begun.inode)? else { return Ok(begun.after) };
        let length = file.metadata()?.len();
        if length >= begun.size.saturating_add(begun.length) {
            return Ok(begun.after);
        }
        if length > begun.size {
            file.set_len(begun.size)?;
        }
        Ok(self.taken)
    }
}

/// The file with this inode: at `path`, or beside it, where the kubelet puts it when it rotates.
fn with_inode(path: &Path, inode: u64) -> io::Result<Option<File>> {
    let Some(directory) = path.parent() else { return Ok(None) };
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.metadata().is_ok_and(|found| found.is_file() && found.ino() == inode) {
            return OpenOptions::new().write(true).open(entry.path()).map(Some);
        }
    }
    Ok(None)
}

/// The file that holds a [`Progress`].
pub struct ProgressFile(File);

impl ProgressFile {
    /// Opens or makes the file, and gives what is in the log at `log`.
    pub fn open(path: &Path, log: Option<&Path>) -> io::Result<(Self, Taken)> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = Vec::with_capacity(NUMBERS * 8);
        (&file).take(NUMBERS as u64 * 8).read_to_end(&mut bytes)?;
        let progress = Progress::decode(&bytes);
        let taken = match log {
            Some(log) => progress.settle(log)?,
            None => progress.taken,
        };
        Ok((Self(file), taken))
    }

    /// Keeps `progress`. A kill cannot tear it: it is one write within a page.
    pub fn keep(&self, progress: Progress) -> io::Result<()> {
        self.0.write_all_at(&progress.encode(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRIES: &[u8] = b"three\nfour\n";

    /// A log with a begun write, of which `written` is there; it was `rotated` after that.
    fn settled(written: &[u8], rotated: bool) -> (Taken, String) {
        let directory = tempfile::tempdir().expect("a directory");
        let (log, progress) = (directory.path().join("0.log"), directory.path().join("p"));
        std::fs::write(&log, [b"one\ntwo\n", written].concat()).expect("written");
        let inode = log.metadata().expect("there").ino();
        let begun = Begun { inode, size: 8, length: ENTRIES.len() as u64, after: [8, 20] };
        let (file, none) = ProgressFile::open(&progress, Some(&log)).expect("opened");
        assert_eq!(none, [0, 0]);
        file.keep(Progress { taken: [8, 9], begun: Some(begun) }).expect("kept");
        let mut now = log.clone();
        if rotated {
            now = directory.path().join("0.log.20261122-120000");
            std::fs::rename(&log, &now).expect("renamed");
            std::fs::write(&log, "").expect("made");
        }
        let (_, taken) = ProgressFile::open(&progress, Some(&log)).expect("opened");
        (taken, std::fs::read_to_string(now).expect("text"))
    }

    #[test]
    fn the_length_of_the_log_tells_whether_a_write_was_done() {
        for rotated in [false, true] {
            assert_eq!(settled(b"", rotated), ([8, 9], "one\ntwo\n".into()));
            assert_eq!(settled(ENTRIES, rotated), ([8, 20], "one\ntwo\nthree\nfour\n".into()));
        }
    }

    #[test]
    fn a_part_of_a_write_is_taken_back() {
        for count in 1..ENTRIES.len() {
            assert_eq!(settled(&ENTRIES[..count], count % 2 == 0), ([8, 9], "one\ntwo\n".into()), "{count}");
        }
    }

    #[test]
    fn what_an_earlier_version_kept_is_known() {
        let bytes: Vec<u8> = [5u64, 7].into_iter().flat_map(u64::to_le_bytes).collect();
        assert_eq!(Progress::decode(&bytes), Progress { taken: [5, 7], begun: None });
        assert_eq!(Progress::decode(&bytes[..9]), Progress { taken: [5, 0], begun: None });
    }

    #[test]
    fn a_log_that_is_gone_had_it_all() {
        let directory = tempfile::tempdir().expect("a directory");
        let progress = directory.path().join("p");
        let (file, _) = ProgressFile::open(&progress, None).expect("opened");
        let begun = Begun { inode: u64::MAX, size: 0, length: 5, after: [5, 0] };
        file.keep(Progress { taken: [0, 0], begun: Some(begun) }).expect("kept");
        for log in ["0.log", "gone/0.log"] {
            let (_, taken) = ProgressFile::open(&progress, Some(&directory.path().join(log))).expect("opened");
            assert_eq!(taken, [5, 0]);
        }
    }
}
