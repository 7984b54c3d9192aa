//! `soak log|pods MINUTES`: see [`isopod_tests::soak`]. Runs in the test node.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use isopod_tests::soak::{log, pods};

#[tokio::main]
async fn main() -> Result<()> {
    let usage = "usage: soak log|pods MINUTES";
    let (what, minutes) = (std::env::args().nth(1).context(usage)?, std::env::args().nth(2).context(usage)?);
    let duration = Duration::from_secs(minutes.parse::<u64>().context(usage)? * 60);
    match what.as_str() {
        "log" => log::run(duration).await,
        "pods" => {
            println!("{}", pods::run(duration, pods::AT_ONCE).await?);
            Ok(())
        }
        _ => bail!(usage),
    }
}
