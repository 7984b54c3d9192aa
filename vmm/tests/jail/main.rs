//! Code planted in the VMM, as by a guest that has taken it over, and what it gets: nothing, from each layer of the jail alone.
//!
//! An attempt runs in a process of its own, which is this program again.

mod attempts;
mod sys;

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use isopod_vmm::jail::seccomp::{self, Thread};
use isopod_vmm::jail::{self, User};

use attempts::{ATTEMPTS, Attempt, OF_WORKERS, Outside};

/// Says in a planted process which attempt it is to make, and in what jail.
const PLANTED: &str = "ISOPOD_PLANTED";
/// Says there what is outside.
const OUTSIDE: &str = "ISOPOD_OUTSIDE";
/// The status of a planted process that got what it wanted.
const DONE: i32 = 200;
const USER: User = User { uid: 0x7000_0001, gid: 0x7000_0001 };
/// Every kind of thread that runs while the guest does.
const THREADS: [(&str, Thread); 8] = [
    ("main", Thread::Main),
    ("vcpu", Thread::Vcpu),
    ("starter", Thread::Starter),
    ("block", Thread::Block),
    ("fs", Thread::FileSystem),
    ("net", Thread::Net),
    ("rng", Thread::Rng),
    ("vsock", Thread::Vsock),
];

/// Makes one attempt if this is a planted process, and ends it: with [`DONE`], or the number of the error.
fn be_planted() {
    let (Ok(what), Ok(outside)) = (std::env::var(PLANTED), std::env::var(OUTSIDE)) else { return };
    let (jail, name) = what.split_once(' ').expect("two words");
    let attempt = ATTEMPTS.iter().chain(OF_WORKERS).find(|attempt| attempt.name == name).expect("it is in the list");
    let outside = Outside::parse(&outside).expect("as it was written");
    match jail {
        "nothing" => {}
        "layers" => drop(jail::enter(USER, 1 << 20).expect("root may")),
        thread => {
            let (_, thread) = THREADS.iter().find(|(name, _)| *name == thread).expect("it is in the list");
            seccomp::prepare();
            seccomp::confine(*thread).expect("the kernel takes it");
        }
    }
    sys::end(match (attempt.call)(&outside) {
        Ok(()) => DONE,
        Err(errno) => errno,
    });
}

/// The outside, with whom planted code would talk.
struct Victims {
    _abstract: UnixListener,
    _tcp: TcpListener,
    outside: Outside,
}

impl Victims {
    fn new() -> Self {
        let name = format!("isopod-jail-test-{}-{:?}", std::process::id(), std::thread::current().id());
        let address = SocketAddr::from_abstract_name(&name).expect("a short name");
        let tcp = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let port = tcp.local_addr().expect("bound").port();
        let outside = Outside { pid: std::process::id(), socket: name, port };
        Self { _abstract: UnixListener::bind_addr(&address).expect("it is ours"), _tcp: tcp, outside }
    }

    fn plant(&self, test: &str, jail: &str, attempt: &str) -> ExitStatus {
        Command::new(std::env::current_exe().expect("it runs"))
            .args([test, "--exact", "--nocapture"])
            .env(PLANTED, format!("{jail} {attempt}"))
            .env(OUTSIDE, self.outside.to_string())
            .output()
            .expect("it starts")
            .status
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root can make a jail");
    }
    root
}

#[test]
fn root_planted_code_is_killed_at_its_first_call_whatever_thread_it_has() {
    be_planted();
    if !is_root() {
        return;
    }
    let all_are_killed = |thread: &str, attempts: &[Attempt]| {
        let victims = Victims::new();
        for attempt in attempts {
            let name = "root_planted_code_is_killed_at_its_first_call_whatever_thread_it_has";
            let status = victims.plant(name, thread, attempt.name);
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{} in a {thread} thread: {status}", attempt.name);
        }
    };
    for (thread, _) in THREADS {
        all_are_killed(thread, ATTEMPTS);
    }
    // What runs the guest has nothing of what serves it.
    all_are_killed("vcpu", OF_WORKERS);
}

#[test]
fn root_planted_code_gets_errors_even_without_a_filter() {
    be_planted();
    if !is_root() {
        return;
    }
    let victims = Victims::new();
    for attempt in ATTEMPTS {
        let Some(errors) = attempt.without_filter else { continue };
        let plant = |jail| victims.plant("root_planted_code_gets_errors_even_without_a_filter", jail, attempt.name);
        let jailed = plant("layers");
        let code = jailed.code().expect("nothing kills it");
        assert!(
            errors.contains(&code),
            "{}: {jailed}, errno {}",
            attempt.name,
            std::io::Error::from_raw_os_error(code)
        );
        // It is the jail that keeps it from succeeding, not the way it is tried.
        let free = plant("nothing");
        assert_eq!(free.code(), Some(DONE), "{} outside of the jail: {free}", attempt.name);
    }
}
