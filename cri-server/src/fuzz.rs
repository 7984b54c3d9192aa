//! Entry points for the fuzzer (`fuzz/`): everything in the daemon that gets bytes of clients, guests, plugins or pod specs.

mod specs;
mod streams;

use std::path::Path;
use std::sync::Arc;

use isopod_proto::agent::{Hello, StatsResponse, StreamOpened};
use isopod_proto::vmm::ControlReply;
use isopod_proto::{MAX_CONTROL_MESSAGE, MAX_HELLO, MAX_STREAM_HEADER, ObjectId, decode_frame};
use prost::Message;
use time::OffsetDateTime;

use crate::cni::{list, result::Outcome};
use crate::container::ContainerRecord;
use crate::container::log::{Lines, MAX_LINE};
use crate::container::seccomp::{compile, profile};
use crate::cpu_set::CpuSet;
use crate::grpc::{counters, metrics};
use crate::sandbox::SandboxRecord;
use crate::volume::{kubelet, mountinfo};

pub use specs::specs;
pub use streams::{spdy, web_socket};

/// A seccomp profile, and the program made of it.
pub fn seccomp(input: &[u8]) {
    let Ok(profile) = profile::parse(input, &|capability| capability.len() % 2 == 0) else { return };
    let Ok(program) = compile::compile(&profile) else { return };
    assert!(!program.is_empty() && program.len() <= compile::MAX_INSTRUCTIONS);
    // Every jump lands on an instruction.
    for (index, instruction) in program.iter().enumerate() {
        let farthest = match instruction.code & 7 {
            5 if instruction.code & 0xf0 == 0 => instruction.k as usize,
            5 => usize::from(instruction.when_true.max(instruction.when_false)),
            _ => continue,
        };
        assert!(index + 1 + farthest < program.len(), "a jump past the end");
    }
}

/// A CNI configuration, and a plugin's answer.
pub fn cni(input: &[u8]) {
    let _ = list::parse(input);
    if let Ok(value) = serde_json::from_slice(input) {
        let _ = Outcome::parse(&value);
    }
}

/// Texts of the host.
pub fn text(input: &[u8]) {
    let mounts = mountinfo::parse(input);
    let _ = mountinfo::mount_of(&mounts, Path::new("/a/b"));
    let _ = crate::oom::victim(input);
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Some(set) = CpuSet::parse(text) {
        assert_eq!(CpuSet::parse(&set.to_string()), Some(set));
    }
    let _ = crate::vmm::stat::field(text, 22);
    let path = Path::new(text);
    if let Some(volume) = kubelet::parse(path) {
        assert!(path.starts_with(volume.pods));
    }
    assert_eq!(kubelet::guest_name(path).len(), 32);
}

/// Output of a container, in pieces: the log has all of its bytes in order, and counts them.
pub fn log(input: &[u8]) {
    let Some((first, rest)) = input.split_first() else { return };
    let piece = usize::from(*first) * 97 + 1;
    let (mut lines, mut entries, mut taken) = (Lines::default(), Vec::new(), 0);
    // Long lines are what is cut: each byte of the input is several of the output.
    let output: Vec<u8> =
        rest.iter().flat_map(|byte| std::iter::repeat_n(*byte, if *byte == b'\n' { 1 } else { 64 })).collect();
    for piece in output.chunks(piece) {
        taken += lines.push(piece, "stdout", OffsetDateTime::UNIX_EPOCH, &mut entries);
    }
    taken += lines.finish("stdout", OffsetDateTime::UNIX_EPOCH, &mut entries);
    assert_eq!(taken, output.len() as u64);
    let mut text = Vec::new();
    for entry in entries.split_inclusive(|byte| *byte == b'\n') {
        let (head, content) = entry.split_at(b"1970-01-01T00:00:00.000000000Z stdout P ".len());
        assert!(head.starts_with(b"1970-01-01T") && content.len() <= MAX_LINE + 1);
        text.extend(&content[..content.len() - 1]);
        if head.ends_with(b" F ") {
            text.push(b'\n');
        }
    }
    let plain = |bytes: &[u8]| bytes.iter().copied().filter(|byte| *byte != b'\r').collect::<Vec<_>>();
    assert_eq!(plain(&text), plain(&output));
}

/// What an agent and a VMM answer: the first byte chooses the message.
pub fn answers(input: &[u8]) {
    let Some((kind, input)) = input.split_first() else { return };
    match kind % 4 {
        0 => drop(decode_frame::<Hello>(input, MAX_HELLO)),
        1 => drop(decode_frame::<StreamOpened>(input, MAX_STREAM_HEADER)),
        2 => drop(decode_frame::<ControlReply>(input, MAX_CONTROL_MESSAGE)),
        _ => counters_of(input),
    }
}

fn counters_of(input: &[u8]) {
    let Ok(mut guest) = StatsResponse::decode(input) else { return };
    let sandbox = SandboxRecord::for_tests(ObjectId::from_random([1; 32]));
    let record = Arc::new(ContainerRecord::for_tests(ObjectId::from_random([2; 32]), sandbox.id.clone()));
    for counters in &mut guest.containers {
        counters.id = record.id.to_string();
    }
    let records = [Arc::clone(&record)];
    let containers = counters::containers(&records, &guest, Path::new("/scratch"));
    assert!(containers.len() <= 1);
    let pod = counters::pod(&sandbox, &guest, containers);
    let interfaces = pod.linux.and_then(|linux| linux.network).map_or(0, |network| network.interfaces.len());
    assert!(interfaces <= counters::MAX_DEVICES);
    for metric in metrics::of_pod(&sandbox, &records, &guest).container_metrics.iter().flat_map(|of| &of.metrics) {
        assert!(metric.label_values.iter().all(|value| value.len() <= 100), "{:?}", metric.label_values);
    }
}
