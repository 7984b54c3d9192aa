//! What `make bench-images` measures.
//!
//! * `pull ROOT CERTS REFERENCE...`: pulls the images into the store at ROOT, one after the other; registries are as the
//!   directory CERTS says (containerd's `certs.d`). Says of each how many seconds it took, its id, and the most memory so far.
//! * `pull --floor BLOB...`: decompresses the layers, hashes what is in the files and what comes out, and does nothing else.
//! * `pull --written DIRECTORY BLOB...`: the same, and what comes out is written to files there, synced, and hashed in blocks.

use std::collections::VecDeque;
use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use isopod_image_store::{Auth, ImageStore, StoreConfig};
use sha2::{Digest, Sha256};

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [floor, blobs @ ..] if floor == "--floor" => plain(blobs, None),
        [floor, directory, blobs @ ..] if floor == "--written" => plain(blobs, Some(directory.as_ref())),
        [root, certs, references @ ..] if !references.is_empty() => pull(root, certs, references),
        _ => {
            Err("usage: pull ROOT CERTS REFERENCE... | pull --floor BLOB... | pull --written DIRECTORY BLOB...".into())
        }
    }
}

#[tokio::main]
async fn pull(root: &str, certs: &str, references: &[String]) -> Result<(), Failure> {
    let mut config = StoreConfig::new(root);
    config.registries.certs_directory = Some(PathBuf::from(certs));
    let store = ImageStore::open(config)?;
    for reference in references {
        let start = Instant::now();
        let id = store.pull(reference, &Auth::Anonymous).await?;
        println!("{} {id} {}", start.elapsed().as_secs_f64(), peak_memory()?);
    }
    Ok(())
}

/// As many blobs at once as there are CPUs.
fn plain(blobs: &[String], directory: Option<&Path>) -> Result<(), Failure> {
    let start = Instant::now();
    let left: Mutex<VecDeque<&String>> = Mutex::new(blobs.iter().collect());
    let work = || -> Result<u64, Failure> {
        let mut bytes = 0;
        loop {
            let next = left.lock().map_err(|_| "a thread died")?.pop_front();
            let Some(path) = next else { return Ok(bytes) };
            bytes += inflate(path, directory)?;
        }
    };
    let threads = thread::available_parallelism()?.get();
    let bytes = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let results = threads.into_iter().map(|thread| thread.join().map_err(|_| Failure::from("a thread died"))?);
        results.sum::<Result<u64, Failure>>()
    })?;
    println!("{} {bytes} {}", start.elapsed().as_secs_f64(), peak_memory()?);
    Ok(())
}

/// The most memory this process has had, in KiB.
fn peak_memory() -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
    peak.ok_or_else(|| "the kernel tells no VmHWM".into())
}

/// The size of what is in the blob.
fn inflate(path: &str, directory: Option<&Path>) -> Result<u64, Failure> {
    let mut written = directory.map(Written::new).transpose()?;
    let mut input = BufReader::with_capacity(256 << 10, Hashed { input: File::open(path)?, hasher: Sha256::new() });
    let gzip = input.fill_buf()?.starts_with(&[0x1f, 0x8b]);
    let (mut hasher, mut buffer, mut bytes) = (Sha256::new(), vec![0; 256 << 10], 0);
    let mut output: Box<dyn Read> = match gzip {
        true => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        false => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
    };
    loop {
        let length = output.read(&mut buffer)?;
        if length == 0 {
            written.map_or(Ok(()), |written| written.file.sync_all())?;
            // So that the compiler leaves nothing out.
            std::hint::black_box(hasher.finalize());
            return Ok(bytes);
        }
        hasher.update(&buffer[..length]);
        written.as_mut().map_or(Ok(()), |written| written.write(&buffer[..length]))?;
        bytes += length as u64;
    }
}

/// What is done with a tar by whoever keeps it as it is, but verifies each block that is read: it is written and synced, and hashed in blocks.
struct Written {
    file: File,
    block: Sha256,
    filled: usize,
}

impl Written {
    const BLOCK: usize = 4096;

    fn new(directory: &Path) -> std::io::Result<Self> {
        let path = directory.join(format!("written-{:?}", thread::current().id()));
        let file = File::create(&path)?;
        // Its bytes are gone when it is closed.
        std::fs::remove_file(path)?;
        Ok(Self { file, block: Sha256::new(), filled: 0 })
    }

    fn write(&mut self, mut data: &[u8]) -> std::io::Result<()> {
        self.file.write_all(data)?;
        while !data.is_empty() {
            let (now, later) = data.split_at(data.len().min(Self::BLOCK - self.filled));
            self.block.update(now);
            self.filled += now.len();
            if self.filled == Self::BLOCK {
                std::hint::black_box(self.block.finalize_reset());
                self.filled = 0;
            }
            data = later;
        }
        Ok(())
    }
}

struct Hashed {
    input: File,
    hasher: Sha256,
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.input.read(buffer)?;
        self.hasher.update(&buffer[..length]);
        Ok(length)
    }
}
