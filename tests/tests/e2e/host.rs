//! A node that cannot run microVMs: `Status` and RunPodSandbox say why, and nothing of the pod is left.

use isopod_cri_server::cri;
use isopod_tests::fixture::{Daemon, TestPod};

/// The node's devices without /dev/kvm.
const NO_KVM: &str = "
    mkdir -p /run/devices && mount -t tmpfs devices /run/devices && mkdir /run/devices/net
    for device in null zero full random urandom tty net/tun; do cp -a /dev/$device /run/devices/$device; done
    mount --move /run/devices /dev";
/// A /dev/kvm that nobody may open: its file system is mounted with `nodev`.
const FORBIDDEN_KVM: &str = "
    mkdir -p /run/nodev && mount -t tmpfs -o nodev nodev /run/nodev && cp -a /dev/kvm /run/nodev/kvm
    mount --bind /run/nodev/kvm /dev/kvm";
/// A CPU without hardware virtualization, as far as the kernel tells.
const NO_VIRTUALIZATION: &str = "
    sed 's/ svm//; s/ vmx//' /proc/cpuinfo > /run/cpuinfo
    mount --bind /run/cpuinfo /proc/cpuinfo";

async fn refuses_pods(prelude: &str, problem: &str) -> anyhow::Result<()> {
    let daemon = Daemon::start_after(prelude, |_| ()).await?;
    let cri = daemon.cri().await?;
    let status =
        cri.runtime.clone().status(cri::StatusRequest::default()).await?.into_inner().status.unwrap_or_default();
    let ready = status.conditions.iter().find(|condition| condition.r#type == "RuntimeReady").expect("the condition");
    assert!(!ready.status && ready.message.contains(problem), "{ready:?}");

    let request = cri::RunPodSandboxRequest { config: Some(TestPod::config("refused")), ..Default::default() };
    let error = cri.runtime.clone().run_pod_sandbox(request).await.expect_err("no VM can run");
    assert!(error.message().contains(problem), "{error}");
    assert!(cri.sandboxes(None).await?.is_empty());
    let left = std::fs::read_dir(daemon.state.join("sandboxes")).map_or(0, |entries| entries.count());
    assert_eq!(left, 0, "directories of sandboxes are left");
    Ok(())
}

#[tokio::test]
async fn without_kvm_a_pod_is_refused_and_the_missing_device_is_named() -> anyhow::Result<()> {
    refuses_pods(NO_KVM, "/dev/kvm does not exist").await
}

#[tokio::test]
async fn with_a_kvm_that_may_not_be_opened_a_pod_is_refused() -> anyhow::Result<()> {
    refuses_pods(FORBIDDEN_KVM, "/dev/kvm").await
}

#[tokio::test]
async fn on_a_cpu_without_virtualization_a_pod_is_refused_at_once() -> anyhow::Result<()> {
    refuses_pods(NO_VIRTUALIZATION, "neither vmx nor svm").await
}
