//! `isopod-fs`: the file server of one pod. Started by the daemon.

use std::io::{stdin, stdout};
use std::process::ExitCode;

use isopod_file_server::{broker, jail, let_faults_kill, take_inherited_fd};

const USAGE: &str = "usage: isopod-fs broker CONTROL_FD FUSE_FD | isopod-fs --version";

fn main() -> ExitCode {
    let_faults_kill();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["--version"] => {
            println!("isopod-fs {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["broker", control, fuse] => inherited(control, fuse)
            .and_then(|(control, fuse)| broker::run(stdin(), stdout(), &control.into(), fuse.into())),
        // Only the broker starts this.
        ["serve", fuse, control] => {
            inherited(fuse, control).and_then(|(fuse, control)| jail::serve(fuse.into(), control.into()))
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("isopod-fs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn inherited(first: &str, second: &str) -> std::io::Result<(std::os::fd::OwnedFd, std::os::fd::OwnedFd)> {
    let number = |text: &str| text.parse().map_err(|_| std::io::Error::other(USAGE));
    let (first, second) = (number(first)?, number(second)?);
    if first == second {
        return Err(std::io::Error::other(USAGE));
    }
    Ok((take_inherited_fd(first)?, take_inherited_fd(second)?))
}
