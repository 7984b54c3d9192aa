//! Commands in containers, and streams into them.

use tonic::Status;

use super::{Sandboxes, failed, limit};
use crate::cri;
use crate::grpc::{convert, observe, status};
use crate::sandbox::command::Command;
use crate::streaming::requests::{Session, Wanted};

impl Sandboxes {
    /// ExecSync.
    pub(super) async fn exec_sync(&self, request: cri::ExecSyncRequest) -> Result<cri::ExecSyncResponse, Status> {
        observe("ExecSync", &request.container_id, async {
            if request.cmd.is_empty() {
                return Err(status::invalid("cmd is empty"));
            }
            let (sandbox, container) = self.existing(&request.container_id)?;
            let command = |reply| Command::Exec(container, request.cmd, limit(request.timeout), reply);
            let outcome = self.runtime.ask(&sandbox, command).await.map_err(failed)?;
            Ok(convert::exec_reply(outcome))
        })
        .await
    }

    /// Exec: a URL at which the client runs the command.
    pub(super) async fn exec(&self, request: cri::ExecRequest) -> Result<cri::ExecResponse, Status> {
        let cri::ExecRequest { container_id, cmd: command, tty, stdin, stdout, stderr } = request;
        observe("Exec", &container_id, async {
            let wanted = checked(Wanted { stdin, stdout, stderr, tty })?;
            if command.is_empty() {
                return Err(status::invalid("cmd is empty"));
            }
            let (sandbox, container) = self.existing(&container_id)?;
            // What cannot be run now is refused now, and not to a client that has connected.
            let (check, words) = (container.clone(), command.clone());
            let open = |reply| Command::OpenExec(check, words, wanted, reply);
            self.runtime.ask(&sandbox, open).await.map_err(failed)?;
            let session = Session::Exec { sandbox, container, command, wanted };
            Ok(cri::ExecResponse { url: self.streaming.promise(session).map_err(failed)? })
        })
        .await
    }

    /// Attach: a URL at which the client gets the container's streams.
    pub(super) async fn attach(&self, request: cri::AttachRequest) -> Result<cri::AttachResponse, Status> {
        let cri::AttachRequest { container_id, stdin, tty, stdout, stderr } = request;
        observe("Attach", &container_id, async {
            let wanted = checked(Wanted { stdin, stdout, stderr, tty })?;
            let (sandbox, container) = self.existing(&container_id)?;
            let check = container.clone();
            // As above.
            let open = |reply| Command::OpenAttach(check, wanted, reply);
            self.runtime.ask(&sandbox, open).await.map_err(failed)?;
            let session = Session::Attach { sandbox, container, wanted };
            Ok(cri::AttachResponse { url: self.streaming.promise(session).map_err(failed)? })
        })
        .await
    }

    /// PortForward: a URL at which the client connects to ports of the pod.
    pub(super) async fn port_forward(
        &self,
        request: cri::PortForwardRequest,
    ) -> Result<cri::PortForwardResponse, Status> {
        let cri::PortForwardRequest { pod_sandbox_id, port } = request;
        observe("PortForward", &pod_sandbox_id, async {
            let port_of = |port: &i32| match u16::try_from(*port) {
                Ok(port) if port != 0 => Ok(port),
                _ => Err(status::invalid(format!("{port} is not a TCP port"))),
            };
            let ports = port.iter().map(port_of).collect::<Result<_, _>>()?;
            let sandbox = self.runtime.context().index.sandbox(&pod_sandbox_id).map_err(failed)?.id.clone();
            // As above.
            self.runtime.ask(&sandbox, Command::OpenPorts).await.map_err(failed)?;
            let session = Session::PortForward { sandbox, ports };
            Ok(cri::PortForwardResponse { url: self.streaming.promise(session).map_err(failed)? })
        })
        .await
    }
}

/// The streams a client asks for; a terminal has one output.
fn checked(wanted: Wanted) -> Result<Wanted, Status> {
    if wanted.tty && wanted.stderr {
        return Err(status::invalid("tty and stderr cannot both be asked for: a terminal has one output"));
    }
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return Err(status::invalid("one of stdin, stdout and stderr must be asked for"));
    }
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_that_cannot_be_are_refused() {
        let wanted = Wanted { stdout: true, stderr: true, ..Wanted::default() };
        assert!(checked(wanted).is_ok());
        for refused in [Wanted { tty: true, ..wanted }, Wanted::default(), Wanted { tty: true, ..Wanted::default() }] {
            assert_eq!(checked(refused).expect_err("refused").code(), tonic::Code::InvalidArgument);
        }
    }
}
