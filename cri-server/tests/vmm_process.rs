//! The VMM process as the daemon sees it, with small scripts in the VMM's place.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use isopod_cri_server::vmm::{Configuration, Vm, VmSpec, VmmError};
use isopod_proto::encode_frame;
use isopod_proto::vmm::vm_exit::Reason;
use isopod_proto::vmm::{VmConfig, VmExit};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

/// A directory with a program that is `script`, run by the shell.
fn fake(script: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let binary = directory.path().join("vmm");
    std::fs::write(&binary, format!("#!/bin/sh\n{script}\n")).expect("written");
    std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o755)).expect("made executable");
    (directory, binary)
}

fn spec(directory: &Path, binary: PathBuf) -> VmSpec {
    let null = || File::open("/dev/null").expect("it exists");
    VmSpec {
        binary,
        directory: directory.into(),
        uid: 0x7000_0000,
        vcpus: 1,
        max_vcpus: 1,
        max_memory_bytes: 0,
        memory_bytes: 64 << 20,
        kernel: null(),
        initramfs: null(),
        disks: Vec::new(),
        interface: (OwnedFd::from(null()), [2, 0, 0, 0, 0, 1], 1500),
        verbose_console: false,
    }
}

fn spawn(directory: &Path, binary: PathBuf) -> Result<(Vm, Configuration), VmmError> {
    let sockets = Vm::listen(directory).expect("it listens");
    Vm::spawn(spec(directory, binary), sockets)
}

async fn start(directory: &Path, binary: PathBuf) -> Result<Vm, VmmError> {
    let (vm, configuration) = spawn(directory, binary)?;
    configuration.deliver(&vm).await?;
    Ok(vm)
}

fn process_exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn a_vmm_that_exits_with_a_record_is_told_by_it_and_reaped() {
    let (directory, binary) =
        fake("cat /proc/self/fd/$2 >/dev/null; cat \"$(dirname \"$0\")/record\" >\"$(dirname \"$0\")/exit\"; exit 13");
    let record =
        VmExit { reason: Reason::KvmUnusable.into(), message: "no KVM here".into(), console: b"oops\n".to_vec() };
    std::fs::write(directory.path().join("record"), encode_frame(&record)).expect("written");
    let vm = start(directory.path(), binary).await.expect("started");
    // Any number may wait.
    let (first, second) = timeout(SOON, async { tokio::join!(vm.ended(), vm.ended()) }).await.expect("it exits");
    assert!(first.message.contains("no KVM here") && first.console == "oops", "{first:?}");
    assert_eq!(first, second);
    assert!(!process_exists(vm.identity().pid), "a zombie is left");
}

#[tokio::test]
async fn a_vmm_that_is_killed_is_told_by_its_signal() {
    let (directory, binary) = fake("cat /proc/self/fd/$2 >/dev/null; exec sleep 300");
    let vm = start(directory.path(), binary).await.expect("started");
    let identity = vm.identity();
    assert!(vm.end().is_none());
    let again = Vm::find(identity, directory.path()).expect("it runs");
    vm.kill();
    let end = timeout(SOON, vm.ended()).await.expect("killed");
    assert!(end.message.contains("no exit record") && end.message.contains("9"), "{end:?}");
    timeout(SOON, again.ended()).await.expect("seen by the later daemon as well");
    assert!(matches!(Vm::find(identity, directory.path()), Err(VmmError::Gone { .. })));
}

#[tokio::test]
async fn a_vmm_that_cannot_be_executed_is_an_error() {
    let (directory, binary) = fake("");
    std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o644)).expect("made a plain file");
    let error = start(directory.path(), binary).await.err().expect("not started");
    assert!(matches!(error, VmmError::Spawn { .. }), "{error:?}");
}

#[tokio::test]
async fn a_signal_for_the_daemons_process_group_does_not_reach_the_vmm() {
    let (directory, binary) = fake("cat /proc/self/fd/$2 >/dev/null; exec sleep 300");
    let vm = start(directory.path(), binary).await.expect("started");
    let pid = rustix::process::Pid::from_raw(vm.identity().pid).expect("a pid");
    assert_eq!(rustix::process::getpgid(Some(pid)).expect("it runs"), pid);
    vm.kill();
    timeout(SOON, vm.ended()).await.expect("killed");
}

#[tokio::test]
async fn a_vmm_that_ends_before_it_is_configured_is_told_by_its_end() {
    let (directory, binary) = fake("echo no such option >&2; exit 3");
    let (vm, configuration) = spawn(directory.path(), binary).expect("started");
    timeout(SOON, vm.ended()).await.expect("it exits");
    let error = configuration.deliver(&vm).await.expect_err("nobody reads it");
    let message = error.to_string();
    assert!(message.contains('3') && message.contains("no such option"), "{message}");
}

#[tokio::test]
async fn a_vmm_whose_configuration_is_never_delivered_reads_an_empty_one() {
    let (directory, binary) = fake("cat /proc/self/fd/$2 >\"$(dirname \"$0\")/config\"; exit 5");
    let (vm, configuration) = spawn(directory.path(), binary).expect("started");
    drop(configuration);
    timeout(SOON, vm.ended()).await.expect("it exits");
    assert_eq!(std::fs::read(directory.path().join("config")).expect("there"), b"");
}

#[tokio::test]
async fn a_vmm_inherits_the_descriptors_that_its_configuration_names() {
    let (directory, binary) =
        fake("cat /proc/self/fd/$2 >\"$(dirname \"$0\")/config\"; ls -l /proc/self/fd >\"$(dirname \"$0\")/fds\"");
    let vm = start(directory.path(), binary).await.expect("started");
    timeout(SOON, vm.ended()).await.expect("it exits");
    let config = std::fs::read(directory.path().join("config")).expect("there");
    let config = <VmConfig as prost::Message>::decode(config.as_slice()).expect("a configuration");
    let listing = std::fs::read_to_string(directory.path().join("fds")).expect("there");
    let exit = directory.path().join("exit");
    assert!(listing.contains(&format!(" {} -> {}\n", config.exit_fd, exit.display())), "{config:?} {listing}");
    let socket = format!(" {} -> socket:", config.vsock_fd);
    assert!(listing.contains(&socket), "{config:?} {listing}");
}
