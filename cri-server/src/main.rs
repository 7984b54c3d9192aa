//! `isopod`: the daemon and its few subcommands.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use isopod_cri_server::check::{self, Finding};
use isopod_cri_server::config::{self, Config};
use isopod_cri_server::daemon;
use isopod_cri_server::image_command::{self, ImageCommand};
use isopod_cri_server::stop_all;

const DEFAULT_CONFIG: &str = "/etc/isopod/isopod.toml";

/// A Kubernetes container runtime that runs every pod in a microVM.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file; without it /etc/isopod/isopod.toml if that is there, otherwise the defaults.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the CRI (the default).
    Daemon,
    /// Find out whether this host can run microVMs, and what to do if not.
    Check,
    /// Import, list, remove and pull images.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Stop every pod of this node: those of kube-system after the others.
    StopAll {
        /// Seconds from asking a container to end to killing it.
        #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86400))]
        grace: u64,
    },
    /// Show configurations.
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the default configuration file.
    Default,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("isopod: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.command.unwrap_or(Command::Daemon) {
        Command::Config(ConfigCommand::Default) => {
            std::io::stdout().write_all(config::DEFAULT_FILE.as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check => {
            let findings = check::host(&load(arguments.config.as_deref())?);
            for finding in &findings {
                println!("{finding}");
            }
            let good = findings.iter().all(Finding::is_good);
            Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Image(command) => {
            let config = load(arguments.config.as_deref())?;
            let runtime = async_runtime()?;
            let result = runtime.block_on(image_command::run(command, &config));
            // A thread may still wait for standard input.
            runtime.shutdown_background();
            result.map(|()| ExitCode::SUCCESS)
        }
        Command::StopAll { grace } => {
            let config = load(arguments.config.as_deref())?;
            let runtime = async_runtime()?;
            runtime.block_on(stop_all::run(&config, Duration::from_secs(grace))).map(|()| ExitCode::SUCCESS)
        }
        Command::Daemon => {
            let config = load(arguments.config.as_deref())?;
            tracing_subscriber::fmt()
                .with_env_filter(config.log_level.parse::<tracing_subscriber::EnvFilter>()?)
                .with_writer(std::io::stderr)
                .with_ansi(std::io::stderr().is_terminal())
                .init();
            let runtime = async_runtime()?;
            let result = runtime.block_on(daemon::run(config));
            // Threads that still read or write are not worth waiting for: what they do is undone at the next start.
            runtime.shutdown_background();
            result.map(|()| ExitCode::SUCCESS)
        }
    }
}

fn async_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Runtime::new().context("cannot start the async runtime")
}

fn load(given: Option<&Path>) -> anyhow::Result<Config> {
    match given {
        Some(path) => Ok(Config::load(path)?),
        None if Path::new(DEFAULT_CONFIG).exists() => Ok(Config::load(Path::new(DEFAULT_CONFIG))?),
        None => Ok(Config::parse("", Path::new("(defaults)"))?),
    }
}
