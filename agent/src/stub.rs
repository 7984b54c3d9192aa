//! A stub: the agent's binary run again, single-threaded, to become a process of a container.
//!
//! 1. The first stub joins namespaces that exist and makes its sibling with clone3, in the container's cgroup and, if asked,
//!    in a new PID namespace. It reports [`Event::Forked`] and ends. The sibling is a child of the agent.
//! 2. The sibling makes the other namespaces, enters the pod's user namespace if it has one, mounts the container's file systems
//!    and reports [`Event::Ready`].
//! 3. The agent says go by one message. The stub takes on user, capabilities and filter, and becomes the program.
//!
//! A failure in any step is reported as [`Event::Failed`]; the agent cleans up. The agent closing the socket ends the stub.

pub mod channel;
pub mod message;
mod mounts;
mod pod_init;
mod program;
mod user_namespace;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isopod_proto::ErrorKind;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use self::channel::Channel;
use self::message::{Descriptor, Event, Failure, Launch, Report, Role};
use crate::error::{Context as _, Error, Result};
use crate::sys::{self, Cloned};

/// The first argument that makes the agent's binary a stub.
pub const STUB_ARGUMENT: &str = "isopod-stub";

/// Descriptors that came with the launch, by what they are for.
struct Descriptors(Vec<(Descriptor, OwnedFd)>);

impl Descriptors {
    fn get(&self, wanted: Descriptor) -> Option<BorrowedFd<'_>> {
        self.0.iter().find(|(what, _)| *what == wanted).map(|(_, descriptor)| descriptor.as_fd())
    }

    fn required(&self, wanted: Descriptor) -> Result<BorrowedFd<'_>> {
        self.get(wanted)
            .ok_or_else(|| Error::new(ErrorKind::Internal, format!("the launch has no {wanted:?} descriptor")))
    }
}

/// Runs as a stub; the socket to the agent is standard input. The result is the exit status, if there is one.
pub fn main() -> i32 {
    // Nothing that shares a PID namespace with this process may reach the agent's memory or binary through it.
    if set_dumpable_behavior(DumpableBehavior::NotDumpable).is_err() {
        return 1;
    }
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else { return 1 };
    let mut channel = Channel::new(socket);
    match run(&mut channel) {
        Ok(()) => 0,
        Err(error) => {
            let failure = Failure { kind: error.kind().code(), message: error.chain() };
            // If the agent is gone there is nobody to tell.
            let _ = channel.send(&Report { event: Some(Event::Failed(failure)) }, &[]);
            1
        }
    }
}

fn run(channel: &mut Channel) -> Result<()> {
    let received = channel.receive::<Launch>().context(|| "receive what to launch")?;
    let Some((launch, descriptors)) = received else { return Ok(()) };
    let roles = launch.descriptors();
    let descriptors = Descriptors(roles.zip(descriptors).collect());

    if let Some(program) = &launch.program {
        std::fs::write("/proc/self/oom_score_adj", program.oom_score_adj.to_string())
            .context(|| format!("set oom_score_adj to {}", program.oom_score_adj))?;
    }
    join_namespaces(&descriptors)?;
    let cgroup = descriptors.required(Descriptor::Cgroup)?;
    match sys::clone_sibling(cgroup, launch.new_pid_namespace).context(|| "clone into the container's cgroup")? {
        Cloned::Caller(pid) => report(channel, Event::Forked(pid), &[]),
        Cloned::New => become_process(channel, &launch, &descriptors),
    }
}

fn join_namespaces(descriptors: &Descriptors) -> Result<()> {
    if let Some(target) = descriptors.get(Descriptor::PidNamespace) {
        move_into_thread_name_spaces(target, ThreadNameSpaceType::PROCESS_ID).context(|| "join the PID namespace")?;
    }
    if let Some(target) = descriptors.get(Descriptor::Namespaces) {
        let all = ThreadNameSpaceType::PROCESS_ID
            | ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::CONTROL_GROUP
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::NETWORK;
        move_into_thread_name_spaces(target, all)
            .context(|| "join the container's namespaces")
            .map_err(|error| error.with_kind(ErrorKind::FailedPrecondition))?;
    }
    Ok(())
}

fn become_process(channel: &mut Channel, launch: &Launch, descriptors: &Descriptors) -> Result<()> {
    match launch.role() {
        Role::PodInit => return pod_init::run(channel, &launch.mount_point),
        Role::UserNamespace => return user_namespace::hold(channel),
        Role::Container | Role::Exec => {}
    }
    let program = launch.program.as_ref();
    let program = program.ok_or_else(|| Error::new(ErrorKind::Internal, "the launch has no program"))?;
    program::give_streams(program, launch.stream_owner, descriptors)?;
    if launch.role() == Role::Container {
        mounts::enter_new_root(launch, descriptors)?;
    } else if let Some(namespace) = descriptors.get(Descriptor::UserNamespace) {
        user_namespace::enter(namespace)?;
    }
    program::run(channel, launch.role(), program, descriptors)
}

fn report(channel: &Channel, event: Event, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    channel.send(&Report { event: Some(event) }, descriptors).context(|| "report to the agent")
}

/// Waits for the agent's go. False: the agent has closed the socket, the process is not wanted any more.
fn wait_for_go(channel: &mut Channel) -> Result<bool> {
    let go = channel.receive::<Report>().context(|| "wait for the start")?;
    Ok(go.is_some())
}
