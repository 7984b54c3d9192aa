//! The fuzzer: libFuzzer with one of the targets below, which `ISOPOD_FUZZ_TARGET` names. `fuzz/run` builds and runs it.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

/// What one input is given to.
type Target = fn(&[u8]);

/// All targets. Each panics, hangs or takes too much memory if something is wrong, and must do nothing else but return.
const TARGETS: &[(&str, Target)] = &[
    ("vmm-chain", isopod_vmm::fuzz::chain),
    ("vmm-balloon", isopod_vmm::fuzz::balloon),
    ("vmm-block", isopod_vmm::fuzz::block),
    ("vmm-net", isopod_vmm::fuzz::net),
    ("vmm-rng", isopod_vmm::fuzz::rng),
    ("vmm-vsock", isopod_vmm::fuzz::vsock),
    ("vmm-fs", isopod_vmm::fuzz::file_system),
    ("vmm-mem", isopod_vmm::fuzz::mem),
    ("vmm-registers", isopod_vmm::fuzz::registers),
    ("vmm-config", isopod_vmm::fuzz::config),
    ("vmm-control", isopod_vmm::fuzz::control),
    ("image-tar", isopod_image_store::fuzz::tar),
    ("image-tree", isopod_image_store::fuzz::tree),
    ("image-erofs", isopod_image_store::fuzz::damaged),
    ("image-blob", isopod_image_store::fuzz::blob),
    ("image-documents", isopod_image_store::fuzz::documents),
    ("image-reference", isopod_image_store::fuzz::reference),
    ("image-hosts", isopod_image_store::fuzz::hosts),
    ("image-auth", isopod_image_store::fuzz::auth),
    ("image-archive", isopod_image_store::fuzz::archive),
    ("cri-spdy", isopod_cri_server::fuzz::spdy),
    ("cri-websocket", isopod_cri_server::fuzz::web_socket),
    ("cri-seccomp", isopod_cri_server::fuzz::seccomp),
    ("cri-cni", isopod_cri_server::fuzz::cni),
    ("cri-text", isopod_cri_server::fuzz::text),
    ("cri-log", isopod_cri_server::fuzz::log),
    ("cri-answers", isopod_cri_server::fuzz::answers),
    ("cri-specs", isopod_cri_server::fuzz::specs),
    ("agent-counters", isopod_agent::fuzz::counters),
    ("agent-users", isopod_agent::fuzz::users),
    ("agent-mirror", isopod_agent::fuzz::mirror),
    ("agent-requests", isopod_agent::fuzz::requests),
    ("files-fuse", isopod_file_server::fuzz::requests),
];

static TARGET: OnceLock<Target> = OnceLock::new();

/// Finds the target, or lists all of them and ends. A panic in any thread, also one that a runtime would catch, is told on
/// what is the standard error now, which libFuzzer's `-close_fd_mask` then takes from the targets, and aborts.
fn initialize() {
    let name = std::env::var("ISOPOD_FUZZ_TARGET").unwrap_or_default();
    let Some((_, target)) = TARGETS.iter().find(|(target, _)| *target == name) else {
        for (name, _) in TARGETS {
            println!("{name}");
        }
        std::process::exit(i32::from(!name.is_empty()));
    };
    TARGET.get_or_init(|| *target);
    let error = std::io::stderr().as_fd().try_clone_to_owned().map(File::from).expect("a descriptor");
    std::panic::set_hook(Box::new(move |panic| {
        let _ = writeln!(&error, "{panic}\n{}", std::backtrace::Backtrace::force_capture());
        std::process::abort();
    }));
}

fuzz_target!(init: initialize(), |input: &[u8]| {
    TARGET.get().expect("set before the first input")(input);
});
