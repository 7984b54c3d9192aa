//! What is to be imported, as the bytes of a tar.

use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::path::Path;
use std::thread::{self, JoinHandle};

/// The bytes of an archive, and how many there are, if that is known. An archive is a file, a directory with what would be in one, or `-`,
/// which is the standard input.
pub fn open_archive(archive: &Path) -> io::Result<(Box<dyn Read + Send>, Option<u64>)> {
    if archive == Path::new("-") {
        return Ok((Box::new(io::stdin()), None));
    }
    let metadata = std::fs::metadata(archive)?;
    if !metadata.is_dir() {
        let size = metadata.is_file().then_some(metadata.len());
        return Ok((Box::new(File::open(archive)?), size));
    }
    let (pipe, writer) = io::pipe()?;
    let directory = archive.to_owned();
    let thread = thread::Builder::new().name("archive".into()).spawn(move || {
        let mut builder = tar::Builder::new(writer);
        builder.append_dir_all(".", directory)?;
        builder.finish()
    })?;
    Ok((Box::new(DirectoryReader { pipe, thread: Some(thread) }), None))
}

/// A directory's tar, as a thread makes it. Should nobody read on, the thread ends with the pipe.
struct DirectoryReader {
    pipe: PipeReader,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Read for DirectoryReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.pipe.read(buffer)?;
        if length == 0
            && !buffer.is_empty()
            && let Some(thread) = self.thread.take()
        {
            thread.join().map_err(|_| io::Error::other("the thread that reads the directory died"))??;
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_a_tar_of_its_files() {
        let root = tempfile::TempDir::new().expect("made");
        std::fs::create_dir_all(root.path().join("blobs/sha256")).expect("made");
        std::fs::write(root.path().join("blobs/sha256/x"), b"data").expect("written");
        let (reader, size) = open_archive(root.path()).expect("opened");
        assert_eq!(size, None);
        let mut archive = tar::Archive::new(reader);
        let mut files = Vec::new();
        for entry in archive.entries().expect("a tar") {
            let mut entry = entry.expect("whole");
            let mut text = String::new();
            entry.read_to_string(&mut text).expect("read");
            files.push((entry.path().expect("a path").display().to_string(), text));
        }
        assert!(files.contains(&("blobs/sha256/x".to_owned(), "data".to_owned())), "{files:?}");
    }

    #[test]
    fn a_directory_that_cannot_be_read_is_told() {
        let root = tempfile::TempDir::new().expect("made");
        std::os::unix::fs::symlink("nowhere", root.path().join("dangling")).expect("made");
        let (mut reader, _) = open_archive(root.path()).expect("opened");
        assert!(reader.read_to_end(&mut Vec::new()).is_err());
        assert!(open_archive(&root.path().join("not-there")).is_err());
    }
}
