//! The same work on two container runtimes, side by side: `cri-bench NAME=SOCKET BASELINE=SOCKET`.
//!
//! `cri-bench mount` and `cri-bench resize` measure isopod alone: what an image's file system costs in a guest, and another size of a pod.
//!
//! Runs in the test node, as root. Each row is measured on both in turn; the last column is the first runtime's figure by the
//! baseline's. Times are of this node and mean something only as ratios.

mod io;
mod lifecycle;
mod mount;
mod resize;

use std::path::Path;

use anyhow::{Context, Result};
use isopod_tests::fixture::Cri;

/// What is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Better {
    Less,
    More,
}

/// One measured figure.
#[derive(Clone, Debug)]
struct Figure {
    what: &'static str,
    value: f64,
    unit: &'static str,
    better: Better,
}

impl Figure {
    fn millis(what: &'static str, value: f64) -> Self {
        Self { what, value, unit: "ms", better: Better::Less }
    }

    fn throughput(what: &'static str, bytes: f64, seconds: f64) -> Self {
        Self { what, value: bytes / 1e6 / seconds, unit: "MB/s", better: Better::More }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("mount") => return mount::run().await,
        Some("resize") => return resize::run().await,
        _ => {}
    }
    let runtimes: Vec<(String, String)> = std::env::args()
        .skip(1)
        .map(|argument| {
            let (name, socket) = argument.split_once('=').context("an argument is not NAME=SOCKET")?;
            Ok((name.to_owned(), socket.to_owned()))
        })
        .collect::<Result<_>>()?;
    let [(first, first_socket), (second, second_socket)] = runtimes.as_slice() else {
        anyhow::bail!("usage: cri-bench NAME=SOCKET BASELINE=SOCKET");
    };
    let ours = measure(first, first_socket).await.with_context(|| first.clone())?;
    let theirs = measure(second, second_socket).await.with_context(|| second.clone())?;
    println!("{:<44} {first:>12} {second:>12} {:>6}", "", "ratio");
    for (ours, theirs) in ours.iter().zip(&theirs) {
        anyhow::ensure!(ours.what == theirs.what, "{:?} is beside {:?}", ours.what, theirs.what);
        let aim = if ours.better == Better::Less { "less is better" } else { "more is better" };
        println!(
            "{:<44} {:>12.1} {:>12.1} {:>6.2}  {}, {aim}",
            ours.what,
            ours.value,
            theirs.value,
            ours.value / theirs.value,
            ours.unit
        );
    }
    Ok(())
}

async fn measure(name: &str, socket: &str) -> Result<Vec<Figure>> {
    let socket = Path::new(socket.trim_start_matches("unix://"));
    let cri = Cri::connect(socket).await?;
    let mut figures = lifecycle::measure(&cri).await?;
    figures.extend(io::measure(&cri, socket).await?);
    // It takes minutes; what has been measured is not to be lost with what comes after it.
    for Figure { what, value, unit, .. } in &figures {
        eprintln!("{name}: {what}: {value:.1} {unit}");
    }
    Ok(figures)
}
