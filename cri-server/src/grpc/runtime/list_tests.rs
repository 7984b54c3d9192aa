//! The lists that the kubelet asks for every second, with 500 pods.

use std::sync::Arc;

use futures_util::FutureExt;
use isopod_proto::ObjectId;

use super::Sandboxes;
use crate::container::ContainerRecord;
use crate::cri;
use crate::runtime::Runtime;
use crate::sandbox::SandboxRecord;
use crate::streaming::Streaming;

/// Calls of read and write that this thread has made, as the kernel counts them (/proc/thread-self/io), those of this function
/// included.
fn calls() -> u64 {
    let io = std::fs::read_to_string("/proc/thread-self/io").expect("the kernel counts them");
    let number = |line: &str| line.split_once(": ").and_then(|(_, number)| number.parse::<u64>().ok());
    io.lines().filter(|line| line.starts_with("sysc")).map(|line| number(line).expect("a number")).sum()
}

fn id(kind: u8, number: u16) -> ObjectId {
    let mut bytes = [kind; 32];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    ObjectId::from_random(bytes)
}

#[tokio::test]
async fn lists_of_500_pods_are_made_of_memory_without_a_wait() {
    let directory = tempfile::tempdir().expect("a directory");
    let context = Arc::new(crate::runtime::tests::context(directory.path()));
    for number in 0..500 {
        let sandbox = SandboxRecord::for_tests(id(1, number));
        context.index.publish_sandbox(&sandbox);
        for kind in [2, 3] {
            context.index.publish_container(&ContainerRecord::for_tests(id(kind, number), sandbox.id.clone()));
        }
    }
    let streaming = context.config.streaming.clone();
    let runtime = Runtime::new(context);
    let streaming = Streaming::start(&streaming, runtime.clone()).await.expect("it listens");
    let service = Sandboxes::new(runtime, streaming);

    calls(); // What is allocated once is.
    let alone = calls();
    let alone = calls() - alone;
    let before = calls();
    // Ready when they are asked for the first time: they wait for no file, no lock and no guest.
    let pods = service.list_pod_sandbox(cri::ListPodSandboxRequest::default()).now_or_never();
    let containers = service.list_containers(cri::ListContainersRequest::default()).now_or_never();
    let calls = calls() - before;
    assert_eq!(pods.expect("at once").expect("a list").items.len(), 500);
    assert_eq!(containers.expect("at once").expect("a list").containers.len(), 1000);
    assert_eq!(calls, alone, "something was read or written");
}
