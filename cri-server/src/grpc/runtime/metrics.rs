//! The metrics that the kubelet gives out as `/metrics/cadvisor`.

use tonic::Status;

use super::Sandboxes;
use crate::cri;
use crate::grpc::{Batches, status};

impl Sandboxes {
    /// ListMetricDescriptors.
    pub(super) async fn list_metric_descriptors(
        &self,
        _: cri::ListMetricDescriptorsRequest,
    ) -> Result<cri::ListMetricDescriptorsResponse, Status> {
        Err(status::unimplemented("ListMetricDescriptors"))
    }

    /// ListPodSandboxMetrics.
    pub(super) async fn list_pod_sandbox_metrics(
        &self,
        _: cri::ListPodSandboxMetricsRequest,
    ) -> Result<cri::ListPodSandboxMetricsResponse, Status> {
        Err(status::unimplemented("ListPodSandboxMetrics"))
    }

    /// StreamPodSandboxMetrics.
    pub(super) async fn stream_pod_sandbox_metrics(
        &self,
        _: cri::StreamPodSandboxMetricsRequest,
    ) -> Result<Batches<cri::StreamPodSandboxMetricsResponse>, Status> {
        Err(status::unimplemented("StreamPodSandboxMetrics"))
    }
}
