//! `soak log|pods MINUTES`, `soak restart PODS [BUILD]`, `soak many SANDBOXES`: see [`isopod_tests::soak`]. Runs in the test node.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use isopod_tests::fixture::Build;
use isopod_tests::soak::{log, many, pods, restart};
use rustix::process::Signal;

/// Sandboxes that are started at the same time, as many as an emulated node of 8 GiB takes.
const AT_ONCE: usize = 20;

#[tokio::main]
async fn main() -> Result<()> {
    let usage = "usage: soak log|pods MINUTES | soak restart PODS [BUILD] | soak many SANDBOXES";
    let (what, number) = (std::env::args().nth(1).context(usage)?, std::env::args().nth(2).context(usage)?);
    let number: u32 = number.parse().context(usage)?;
    let duration = Duration::from_secs(u64::from(number) * 60);
    match what.as_str() {
        "log" => log::run(duration).await,
        "pods" => {
            println!("{}", pods::run(duration, pods::AT_ONCE).await?);
            Ok(())
        }
        "restart" => {
            // A crash, or an upgrade as an init does it.
            let (old, signal) = match std::env::args_os().nth(3) {
                Some(directory) => (Build::new(directory.into()), Signal::TERM),
                None => (Build::here()?, Signal::KILL),
            };
            println!("{}", restart::run(number as usize, old, signal).await?);
            Ok(())
        }
        "many" => {
            println!("{}", many::run(number as usize, AT_ONCE).await?);
            Ok(())
        }
        _ => bail!(usage),
    }
}
