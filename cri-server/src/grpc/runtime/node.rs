//! The node: version, conditions, what the daemon was told at its start.

use std::collections::HashMap;

use tonic::Status;

use super::{Sandboxes, features};
use crate::cgroup;
use crate::check::{self, Finding};
use crate::cri;
use crate::grpc::info;

/// Version of the kubelet's runtime API; the kubelet insists on it (cri.md 1.1).
const KUBELET_API_VERSION: &str = "0.1.0";

impl Sandboxes {
    /// Version.
    pub(super) async fn version(&self, _: cri::VersionRequest) -> Result<cri::VersionResponse, Status> {
        Ok(cri::VersionResponse {
            version: KUBELET_API_VERSION.to_owned(),
            runtime_name: "isopod".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: "v1".to_owned(),
        })
    }

    /// Status.
    pub(super) async fn status(&self, request: cri::StatusRequest) -> Result<cri::StatusResponse, Status> {
        let findings = self.findings().await;
        let condition = |kind: &str, network: bool, reason: &str| {
            let problem = check::first_problem(&findings, network);
            cri::RuntimeCondition {
                r#type: kind.to_owned(),
                status: problem.is_none(),
                reason: if problem.is_some() { reason.to_owned() } else { String::new() },
                message: problem.unwrap_or_default(),
            }
        };
        let mut network = condition("NetworkReady", true, "NetworkNotReady");
        if network.status
            && let Err(problem) = self.runtime.context().network.status().await
        {
            network.status = false;
            network.reason = problem.reason.to_owned();
            network.message = problem.message;
        }
        let conditions = vec![condition("RuntimeReady", false, "HostNotReady"), network];
        let info = if request.verbose { info::of_node(&self.runtime.context().config) } else { HashMap::new() };
        Ok(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions }),
            info,
            runtime_handlers: features::handlers(),
            features: Some(features::runtime()),
        })
    }

    /// RuntimeConfig.
    pub(super) async fn runtime_config(
        &self,
        _: cri::RuntimeConfigRequest,
    ) -> Result<cri::RuntimeConfigResponse, Status> {
        let driver = match self.runtime.context().config.cgroup_driver {
            cgroup::Driver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
            cgroup::Driver::Systemd => cri::CgroupDriver::Systemd,
        };
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        Ok(cri::RuntimeConfigResponse { linux: Some(linux) })
    }

    /// UpdateRuntimeConfig.
    pub(super) async fn update_runtime_config(
        &self,
        request: cri::UpdateRuntimeConfigRequest,
    ) -> Result<cri::UpdateRuntimeConfigResponse, Status> {
        // The pods' subnet is the administrator's choice; a call must succeed all the same (cri.md 1.1).
        let network = request.runtime_config.and_then(|config| config.network_config).unwrap_or_default();
        tracing::info!(pod_cidr = network.pod_cidr, "the kubelet's pod CIDR is not used; network.subnet is");
        Ok(cri::UpdateRuntimeConfigResponse {})
    }

    async fn findings(&self) -> Vec<Finding> {
        let config = self.runtime.context().config.clone();
        // It opens devices and files, which may block.
        tokio::task::spawn_blocking(move || check::host(&config)).await.unwrap_or_default()
    }
}
