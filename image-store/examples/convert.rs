//! Converts a layer (tar, plain or compressed with gzip or zstd) to an EROFS file, as a pull does, and says how fast:
//! `convert LAYER OUTPUT`.

use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

use isopod_image_store::{Limits, convert_blob};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [input, output] = arguments.as_slice() else { return Err("usage: convert LAYER OUTPUT".into()) };
    let compressed = std::fs::metadata(input)?.len();
    let start = Instant::now();
    let report = convert_blob(File::open(input)?, Path::new(output), &Limits::default())?;
    let seconds = start.elapsed().as_secs_f64();
    let mega = |bytes: u64| bytes as f64 / 1e6;
    println!(
        "{:.1} MB of layer, {:.1} MB of tar, {:.1} MB of EROFS in {seconds:.2} s: {:.0} MB/s of tar ({})",
        mega(compressed),
        mega(report.tar_bytes),
        mega(report.erofs_bytes),
        mega(report.tar_bytes) / seconds,
        report.diff_id
    );
    Ok(())
}
