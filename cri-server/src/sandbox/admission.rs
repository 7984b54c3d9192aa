//! What may be done in which state: decided here and nowhere else, from states alone.

use super::SandboxPhase;
use crate::container::ContainerState;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Stop the sandbox.
    StopSandbox,
    /// Create a container.
    CreateContainer,
    /// Start a container in this state.
    StartContainer(ContainerPhase),
    /// Stop a container.
    StopContainer(ContainerPhase),
    /// Run a command in a container.
    Exec(ContainerPhase),
    /// Open a container's log again.
    ReopenLog(ContainerPhase),
}

/// A [`ContainerState`] without what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerPhase {
    /// Prepared.
    Created,
    /// Runs.
    Running,
    /// Has ended.
    Exited,
}

impl From<&ContainerState> for ContainerPhase {
    fn from(state: &ContainerState) -> Self {
        match state {
            ContainerState::Created => Self::Created,
            ContainerState::Running { .. } => Self::Running,
            ContainerState::Exited(_) => Self::Exited,
        }
    }
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Do it.
    Proceed,
    /// It is so already: a success.
    Ignore,
    /// It cannot be.
    Deny(Denial),
}

/// Why something cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The sandbox's guest does not run.
    #[error("sandbox is not ready")]
    SandboxNotReady,
    /// No process to do it with.
    #[error("container is not running")]
    NotRunning,
    /// A container is started once.
    #[error("container is not in state created; it cannot be started")]
    NotCreated,
}

/// Decides.
pub fn admit(sandbox: SandboxPhase, request: Request) -> Admission {
    use Admission::{Deny, Ignore, Proceed};
    use ContainerPhase::{Created, Exited, Running};
    let ready = sandbox == SandboxPhase::Ready;
    match request {
        // What is left to be released is released again, which finds nothing if all went well.
        Request::StopSandbox => Proceed,
        Request::CreateContainer if ready => Proceed,
        Request::CreateContainer => Deny(Denial::SandboxNotReady),
        Request::StartContainer(Created) if ready => Proceed,
        Request::StartContainer(Created) => Deny(Denial::SandboxNotReady),
        Request::StartContainer(Running | Exited) => Deny(Denial::NotCreated),
        Request::StopContainer(Running) => Proceed,
        Request::StopContainer(Created | Exited) => Ignore,
        Request::Exec(Running) | Request::ReopenLog(Running) if ready => Proceed,
        Request::Exec(Running) | Request::ReopenLog(Running) => Deny(Denial::SandboxNotReady),
        Request::Exec(Created | Exited) | Request::ReopenLog(Created | Exited) => Deny(Denial::NotRunning),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTAINERS: [ContainerPhase; 3] = [ContainerPhase::Created, ContainerPhase::Running, ContainerPhase::Exited];

    #[test]
    fn a_container_is_started_only_when_created_in_a_ready_sandbox() {
        for sandbox in [SandboxPhase::Starting, SandboxPhase::Ready, SandboxPhase::NotReady] {
            for container in CONTAINERS {
                let allowed = sandbox == SandboxPhase::Ready && container == ContainerPhase::Created;
                let admission = admit(sandbox, Request::StartContainer(container));
                assert_eq!(admission == Admission::Proceed, allowed, "{sandbox:?} {container:?}");
            }
        }
    }

    #[test]
    fn stopping_what_does_not_run_is_a_success() {
        for sandbox in [SandboxPhase::Ready, SandboxPhase::NotReady] {
            assert_eq!(admit(sandbox, Request::StopContainer(ContainerPhase::Created)), Admission::Ignore);
            assert_eq!(admit(sandbox, Request::StopContainer(ContainerPhase::Exited)), Admission::Ignore);
            assert_eq!(admit(sandbox, Request::StopSandbox), Admission::Proceed);
        }
    }

    #[test]
    fn a_command_needs_a_running_container() {
        let exec = |container| admit(SandboxPhase::Ready, Request::Exec(container));
        assert_eq!(exec(ContainerPhase::Running), Admission::Proceed);
        assert_eq!(exec(ContainerPhase::Exited), Admission::Deny(Denial::NotRunning));
        assert_eq!(exec(ContainerPhase::Created), Admission::Deny(Denial::NotRunning));
    }

    /// A sandbox with one container, to which requests are put in any order.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Create,
        Start,
        Stop,
        Exit,
        Exec,
        StopSandbox,
    }

    proptest! {
        #[test]
        fn nothing_starts_twice_or_runs_in_a_stopped_sandbox(steps in proptest::collection::vec(
            prop_oneof![
                Just(Step::Create), Just(Step::Start), Just(Step::Stop), Just(Step::Exit), Just(Step::Exec),
                Just(Step::StopSandbox),
            ],
            0..40,
        )) {
            let (mut sandbox, mut container, mut starts) = (SandboxPhase::Ready, None, 0);
            for step in steps {
                let may = |request| admit(sandbox, request) == Admission::Proceed;
                match (step, container) {
                    (Step::Create, None) if may(Request::CreateContainer) => container = Some(ContainerPhase::Created),
                    (Step::Start, Some(phase)) if may(Request::StartContainer(phase)) => {
                        starts += 1;
                        container = Some(ContainerPhase::Running);
                    }
                    (Step::Stop, Some(phase)) if may(Request::StopContainer(phase)) => {
                        prop_assert_eq!(phase, ContainerPhase::Running);
                        container = Some(ContainerPhase::Exited);
                    }
                    (Step::Exit, Some(ContainerPhase::Running)) => container = Some(ContainerPhase::Exited),
                    (Step::Exec, Some(phase)) if may(Request::Exec(phase)) => {
                        prop_assert_eq!((sandbox, phase), (SandboxPhase::Ready, ContainerPhase::Running));
                    }
                    (Step::StopSandbox, _) => {
                        prop_assert!(may(Request::StopSandbox));
                        sandbox = SandboxPhase::NotReady;
                        if container == Some(ContainerPhase::Running) {
                            container = Some(ContainerPhase::Exited);
                        }
                    }
                    _ => {}
                }
                prop_assert!(starts <= 1);
                prop_assert!(sandbox == SandboxPhase::Ready || container != Some(ContainerPhase::Running));
            }
        }
    }
}
