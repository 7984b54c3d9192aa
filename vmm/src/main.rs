//! `isopod-vmm`: one microVM in one process.

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;

use isopod_vmm::config::{self, Config};
use isopod_vmm::exit::{Exit, Reason};
use isopod_vmm::machine::Machine;
use isopod_vmm::serial::ConsoleRing;
use isopod_vmm::{control, jail, kvm, sys};

/// Most bytes of console in the exit record.
const CONSOLE_TAIL: usize = 64 * 1024;
const USAGE: &str = "usage: isopod-vmm --config-fd N | --version";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["--version"] => {
            println!("isopod-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        ["--config-fd", fd] => match fd.parse() {
            Ok(fd) => ExitCode::from(run(fd)),
            Err(_) => usage(),
        },
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(Exit::new(Reason::BadConfig, USAGE).status())
}

/// Runs the VM that the configuration on `fd` describes and returns the process's status.
fn run(fd: i32) -> u8 {
    let wire = match config::read(fd) {
        Ok(wire) => wire,
        Err(error) => return report(&Exit::from_error(Reason::BadConfig, &error), None, vec![]),
    };
    let record = match sys::take_inherited_fd(wire.exit_fd) {
        Ok(fd) => File::from(fd),
        Err(error) => {
            let message = format!("exit_fd: descriptor {} cannot be taken: {error}", wire.exit_fd);
            return report(&Exit::new(Reason::BadConfig, message), None, vec![]);
        }
    };
    let console = ConsoleRing::default();
    abort_on_panic(&record, &console);
    let exit = Config::from_wire(wire)
        .map_err(|error| Exit::from_error(Reason::BadConfig, &error))
        .and_then(|config| supervise(config, console.clone()))
        .unwrap_or_else(|exit| exit);
    report(&exit, Some(&record), console.tail(CONSOLE_TAIL))
}

/// Runs the VM to its end.
fn supervise(config: Config, console: ConsoleRing) -> Result<Exit, Exit> {
    let internal = |error: std::io::Error| Exit::from_error(Reason::Internal, &error);
    let signals = sys::termination_signals().map_err(internal)?;
    let listener = config.control.try_clone().map_err(internal)?;
    let kvm = kvm::open().map_err(|error| Exit::from_error(Reason::KvmUnusable, &error))?;
    sys::use_one_heap();
    sys::let_faults_kill();
    let landlocked =
        jail::enter(config.user, config.largest_file()).map_err(|error| Exit::from_error(Reason::Internal, &error))?;
    eprintln!("isopod-vmm: in its jail as user {}, with {landlocked}", config.user.uid);
    let mut machine = Machine::start(config, kvm, console).map_err(|error| Exit::from_error(error.reason(), &error))?;
    let exit = control::serve(&mut machine, &listener, &signals).map_err(internal);
    machine.stop();
    exit
}

/// Tells the daemon, and the journal unless the end was asked for, how it ended.
fn report(exit: &Exit, record: Option<&File>, console: Vec<u8>) -> u8 {
    let console = if matches!(exit.reason, Reason::Stopped | Reason::GuestPowerOff) { vec![] } else { console };
    if exit.reason != Reason::Stopped {
        // Standard error may be closed; then there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "isopod-vmm: {}", exit.message);
    }
    if let Some(Err(error)) = record.map(|record| exit.write_record(record, console)) {
        let _ = writeln!(std::io::stderr(), "isopod-vmm: cannot write the exit record: {error}");
    }
    exit.status()
}

/// A panic in any thread is a defect: it is recorded, and the process ends at once.
fn abort_on_panic(record: &File, console: &ConsoleRing) {
    let record = record.try_clone().ok();
    let console = console.clone();
    std::panic::set_hook(Box::new(move |panic| {
        let exit = Exit::new(Reason::Internal, format!("a defect of the VMM: {panic}"));
        // A lock on the ring that this very thread holds cannot be waited for.
        let tail = console.try_tail(CONSOLE_TAIL).unwrap_or_default();
        // The record says it all. An abort would not end process 1 of a PID namespace without a detour.
        sys::exit_now(report(&exit, record.as_ref(), tail));
    }));
}
