//! The metrics that the kubelet gives out as `/metrics/cadvisor`.

use tonic::Status;

use super::Sandboxes;
use crate::cri;
use crate::grpc::{Batches, batches, metrics};

impl Sandboxes {
    /// ListMetricDescriptors.
    pub(super) async fn list_metric_descriptors(
        &self,
        _: cri::ListMetricDescriptorsRequest,
    ) -> Result<cri::ListMetricDescriptorsResponse, Status> {
        Ok(cri::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() })
    }

    /// ListPodSandboxMetrics.
    pub(super) async fn list_pod_sandbox_metrics(
        &self,
        _: cri::ListPodSandboxMetricsRequest,
    ) -> Result<cri::ListPodSandboxMetricsResponse, Status> {
        Ok(cri::ListPodSandboxMetricsResponse { pod_metrics: self.pod_metrics().await })
    }

    /// StreamPodSandboxMetrics.
    pub(super) async fn stream_pod_sandbox_metrics(
        &self,
        _: cri::StreamPodSandboxMetricsRequest,
    ) -> Result<Batches<cri::StreamPodSandboxMetricsResponse>, Status> {
        let list = self.pod_metrics().await;
        let message = |pod_sandbox_metrics| cri::StreamPodSandboxMetricsResponse { pod_sandbox_metrics };
        Ok(batches(list, message))
    }

    async fn pod_metrics(&self) -> Vec<cri::PodSandboxMetrics> {
        let pods = self.ready(|_| true);
        let guests = self.all_counters(pods.keys(), true).await;
        let of = |(id, guest)| Some(metrics::of_pod(pods.get(&id)?, &self.running(&id), &guest));
        guests.into_iter().filter_map(of).collect()
    }
}
