//! The agent's binary: process 1 of a guest, a stub of it, or, for tests, an agent on Unix sockets.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    match arguments[..] {
        [isopod_agent::stub::STUB_ARGUMENT] => ExitCode::from(u8::try_from(isopod_agent::stub::main()).unwrap_or(1)),
        ["--listen-unix", directory, "--cgroup", cgroup] => {
            match isopod_agent::run_on_unix_sockets(Path::new(directory), Path::new(cgroup)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("isopod-agent: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        // The kernel passes what it does not know of its command line; none of it is for the agent.
        _ if std::process::id() == 1 => isopod_agent::run_in_guest(),
        _ => {
            eprintln!("isopod-agent is process 1 of an isopod guest; it does nothing elsewhere");
            ExitCode::FAILURE
        }
    }
}
