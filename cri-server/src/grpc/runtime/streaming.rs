//! Commands in containers, and streams into them.

use tonic::Status;

use super::{Sandboxes, failed, limit};
use crate::cri;
use crate::grpc::{convert, observe, status};
use crate::sandbox::driver::Command;

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

    /// Exec.
    pub(super) async fn exec(&self, _: cri::ExecRequest) -> Result<cri::ExecResponse, Status> {
        Err(status::unimplemented("Exec"))
    }

    /// Attach.
    pub(super) async fn attach(&self, _: cri::AttachRequest) -> Result<cri::AttachResponse, Status> {
        Err(status::unimplemented("Attach"))
    }

    /// PortForward.
    pub(super) async fn port_forward(&self, _: cri::PortForwardRequest) -> Result<cri::PortForwardResponse, Status> {
        Err(status::unimplemented("PortForward"))
    }
}
