//! The last steps of a stub: standard streams, working directory, user, capabilities, filter, and execve.
//!
//! The order matters. What needs privilege comes before the user changes; the seccomp filter comes last of all, and where
//! no_new_privs does not allow an unprivileged process to load it, CAP_SYS_ADMIN is kept until then.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isopod_proto::ErrorKind;
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::process::Rlimit;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::channel::Channel;
use super::message::{CapabilityBits, Descriptor, Event, Owner, Program, Role};
use super::{Descriptors, mounts, report, wait_for_go};
use crate::beneath::{self, Make};
use crate::error::{Context as _, Error, Result};
use crate::{limits, sys};

/// Where programs are looked for if the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Prepares `program`, reports ready, waits for the go and becomes it. Returns only on failure, or if the agent has gone.
pub(super) fn run(channel: &mut Channel, role: Role, program: &Program, descriptors: &Descriptors) -> Result<()> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    enter_cwd(program)?;
    let streams = if program.terminal {
        let (master, slave) = open_terminal(program)?;
        if role == Role::Container {
            mounts::attach_console(&slave)?;
        }
        report(channel, Event::Ready(true), &[master.as_fd()])?;
        Streams::Terminal(slave)
    } else {
        report(channel, Event::Ready(false), &[])?;
        Streams::Given
    };
    if !wait_for_go(channel)? {
        return Ok(());
    }
    rustix::process::setsid().context(|| "make a session")?;
    match &streams {
        Streams::Terminal(slave) => {
            rustix::process::ioctl_tiocsctty(slave).context(|| "take the terminal")?;
            use_as_streams(slave.as_fd(), slave.as_fd(), slave.as_fd())?;
        }
        Streams::Given => use_as_streams(
            descriptors.required(Descriptor::Stdin)?,
            descriptors.required(Descriptor::Stdout)?,
            descriptors.required(Descriptor::Stderr)?,
        )?,
    }
    for limit in &program.rlimits {
        set_limit(limit.resource, limit.soft, limit.hard)?;
    }
    take_identity(program)?;
    sys::close_on_exec_from(3).context(|| "mark descriptors to be closed")?;
    report(channel, Event::Executing(true), &[])?;
    sys::reset_signals();
    confine(program)?;
    Err(execute(program))
}

enum Streams {
    /// The slave of a new terminal is all three.
    Terminal(OwnedFd),
    /// They came with the launch.
    Given,
}

fn use_as_streams(stdin: BorrowedFd<'_>, stdout: BorrowedFd<'_>, stderr: BorrowedFd<'_>) -> Result<()> {
    rustix::stdio::dup2_stdin(stdin).context(|| "set standard input")?;
    rustix::stdio::dup2_stdout(stdout).context(|| "set standard output")?;
    rustix::stdio::dup2_stderr(stderr).context(|| "set standard error")
}

/// A program may open its own streams again, by /dev/stdout; for that they have to be its user's. The pipes are the agent's,
/// so this comes before a user namespace is entered, in which they belong to `owner`.
pub(super) fn give_streams(program: &Program, owner: Option<Owner>, descriptors: &Descriptors) -> Result<()> {
    let Owner { uid, gid } = owner.unwrap_or(Owner { uid: program.uid, gid: program.gid });
    for descriptor in [Descriptor::Stdin, Descriptor::Stdout, Descriptor::Stderr] {
        let Some(stream) = descriptors.get(descriptor) else { continue };
        if beneath::file_type(stream).context(|| "stat a standard stream")? == rustix::fs::FileType::Fifo {
            rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .context(|| format!("give a standard stream to user {uid}"))?;
        }
    }
    Ok(())
}

fn enter_cwd(program: &Program) -> Result<()> {
    let cwd = if program.cwd.is_empty() { "/" } else { &program.cwd };
    let text = || format!("enter the working directory {cwd:?}");
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).context(text)?;
    let made = beneath::make(root.as_fd(), cwd, Make::Directory(Mode::from_raw_mode(0o755)))
        .context(text)
        .map_err(|error| error.with_kind(ErrorKind::InvalidArgument))?;
    if made.new {
        let (uid, gid) = (Uid::from_raw(program.uid), Gid::from_raw(program.gid));
        let flags = rustix::fs::AtFlags::EMPTY_PATH;
        rustix::fs::chownat(&made.descriptor, "", Some(uid), Some(gid), flags).context(text)?;
    }
    rustix::process::fchdir(&made.descriptor).context(text).map_err(|error| error.with_kind(ErrorKind::InvalidArgument))
}

/// A new terminal of the container's devpts: master and slave.
fn open_terminal(program: &Program) -> Result<(OwnedFd, OwnedFd)> {
    let text = || "open a terminal in the container's /dev/pts";
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty()).context(text)?;
    let status = rustix::fs::fstat(&master).context(text)?;
    if status.st_rdev != rustix::fs::makedev(5, 2) {
        return Err(Error::precondition("/dev/pts/ptmx of the container is not a terminal multiplexer"));
    }
    rustix::pty::unlockpt(&master).context(text)?;
    let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY | rustix::pty::OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).context(text)?;
    rustix::fs::fchown(&slave, Some(Uid::from_raw(program.uid)), None).context(text)?;
    Ok((master, slave))
}

fn set_limit(number: u32, soft: u64, hard: u64) -> Result<()> {
    let text = || format!("set resource limit {number} to {soft} (soft) and {hard} (hard)");
    let finite = |value: u64| (value != u64::MAX).then_some(value);
    let resource = limits::resource(number).ok_or_else(|| Error::new(ErrorKind::Internal, text()))?;
    rustix::process::setrlimit(resource, Rlimit { current: finite(soft), maximum: finite(hard) }).context(text)
}

/// Becomes the program's user with its capabilities, and with CAP_SYS_ADMIN besides where the filter will need it.
fn take_identity(program: &Program) -> Result<()> {
    let bits = program.capabilities.unwrap_or_default();
    drop_bounding(bits.bounding)?;
    rustix::thread::set_keep_capabilities(true).context(|| "keep capabilities over the change of user")?;
    let groups: Vec<Gid> = program.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    rustix::thread::set_thread_groups(&groups).context(|| format!("set the groups {:?}", program.groups))?;
    let gid = Gid::from_raw(program.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).context(|| format!("become group {}", program.gid))?;
    let uid = Uid::from_raw(program.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).context(|| format!("become user {}", program.uid))?;
    let extra = if needs_privilege(program) { CapabilitySet::SYS_ADMIN.bits() } else { 0 };
    set_capabilities(CapabilityBits { effective: bits.effective | extra, permitted: bits.permitted | extra, ..bits })?;
    raise_ambient(bits.ambient)?;
    rustix::thread::set_keep_capabilities(false).context(|| "clear the keep-capabilities flag")?;
    if program.no_new_privs {
        rustix::thread::set_no_new_privs(true).context(|| "set no_new_privs")?;
    }
    Ok(())
}

/// Without no_new_privs a filter is for the privileged only, seccomp(2).
fn needs_privilege(program: &Program) -> bool {
    !program.seccomp_filter.is_empty() && !program.no_new_privs
}

/// Loads the filter. From here on the process does nothing but take off a capability and run the program, so that a profile
/// has to allow no more than that.
fn confine(program: &Program) -> Result<()> {
    if !program.seccomp_filter.is_empty() {
        sys::install_seccomp(&program.seccomp_filter, program.seccomp_flags)
            .context(|| "install the seccomp filter")
            .map_err(|error| error.with_kind(ErrorKind::InvalidArgument))?;
    }
    if needs_privilege(program) {
        set_capabilities(program.capabilities.unwrap_or_default())?;
    }
    Ok(())
}

fn drop_bounding(keep: u64) -> Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        // EINVAL: this kernel has no capability of that number.
        let Ok(present) = rustix::thread::capability_is_in_bounding_set(capability) else { break };
        if present && keep & (1 << number) == 0 {
            rustix::thread::remove_capability_from_bounding_set(capability)
                .context(|| format!("drop capability {number} from the bounding set"))?;
        }
    }
    Ok(())
}

fn set_capabilities(bits: CapabilityBits) -> Result<()> {
    let set = CapabilitySet::from_bits_retain;
    let sets = CapabilitySets {
        effective: set(bits.effective),
        permitted: set(bits.permitted),
        inheritable: set(bits.inheritable),
    };
    rustix::thread::set_capabilities(None, sets).context(|| format!("set the capabilities {bits:?}"))
}

fn raise_ambient(bits: u64) -> Result<()> {
    rustix::thread::clear_ambient_capability_set().context(|| "clear the ambient capabilities")?;
    for number in (0..u64::BITS).filter(|number| bits & (1 << number) != 0) {
        rustix::thread::configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(1 << number), true)
            .context(|| format!("raise ambient capability {number}"))?;
    }
    Ok(())
}

/// Runs the program; what comes back is why it could not.
fn execute(program: &Program) -> Error {
    let Some(name) = program.args.first() else { return Error::invalid("the command is empty") };
    let shown = String::from_utf8_lossy(name).into_owned();
    let strings = |list: &[Vec<u8>]| -> std::result::Result<Vec<CString>, std::ffi::NulError> {
        list.iter().map(|bytes| CString::new(bytes.as_slice())).collect()
    };
    let (Ok(arguments), Ok(environment)) = (strings(&program.args), strings(&program.env)) else {
        return Error::invalid(format!("the command {shown:?} has a NUL byte in an argument or a variable"));
    };
    let mut refused = None;
    for candidate in candidates(name, &program.env) {
        let Ok(path) = CString::new(candidate) else { continue };
        let error = sys::execve(&path, &arguments, &environment);
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) if rustix::fs::access(&path, rustix::fs::Access::EXISTS).is_err() => {}
            // Like the shell: a file that may not be run does not end the search, but is what is told in the end.
            Some(libc::EACCES) => refused = Some(error),
            _ => return cannot_run(&shown, &path.to_string_lossy(), error),
        }
    }
    match refused {
        Some(error) => cannot_run(&shown, &shown, error),
        None => Error::not_found(format!("the command {shown:?} does not exist in the container")),
    }
}

fn cannot_run(command: &str, path: &str, error: io::Error) -> Error {
    let text = match error.raw_os_error() {
        Some(libc::ENOENT) => {
            format!("the command {command:?} ({path}) needs an interpreter that is not in the container")
        }
        _ => format!("the command {command:?} ({path}) cannot be run"),
    };
    let kind = match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EAGAIN) => ErrorKind::ResourceExhausted,
        _ => ErrorKind::InvalidArgument,
    };
    Error::io(text, error).with_kind(kind)
}

/// The paths to try for a command, as execvp(3) does.
fn candidates(name: &[u8], environment: &[Vec<u8>]) -> Vec<Vec<u8>> {
    if name.is_empty() {
        return Vec::new();
    }
    if name.contains(&b'/') {
        return vec![name.to_vec()];
    }
    let path = environment.iter().rev().find_map(|variable| variable.strip_prefix(b"PATH="));
    let path = path.unwrap_or(DEFAULT_PATH.as_bytes());
    let join = |directory: &[u8]| match directory {
        // An empty element is the current directory.
        [] => [b"./".as_slice(), name].concat(),
        directory => [directory, b"/", name].concat(),
    };
    path.split(|byte| *byte == b':').map(join).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_looked_for_in_the_path_of_the_environment() {
        let environment = [b"PATH=/a:/b:".to_vec()];
        assert_eq!(candidates(b"x", &environment), [b"/a/x".to_vec(), b"/b/x".to_vec(), b"./x".to_vec()]);
        assert_eq!(candidates(b"./x", &environment), [b"./x".to_vec()]);
        assert_eq!(candidates(b"x", &[]).len(), 6);
        assert!(candidates(b"", &environment).is_empty());
    }
}
