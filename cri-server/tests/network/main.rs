//! The pods' network, in network namespaces of the tests' own.

mod builtin;
mod cni;
mod frames;
mod guest;
mod traffic;

use std::path::Path;
use std::process::Command;

use isopod_cri_server::config::{Config, RawCni, RawConfig, RawNetwork};
use isopod_cri_server::cri;
use isopod_cri_server::network::Network;
use isopod_cri_server::store::Store;
use isopod_proto::ObjectId;

const INSIDE: &str = "ISOPOD_TEST_IN_NAMESPACE";

/// Runs the calling test in a new network namespace. False in there, where the test is to go on.
pub fn moved_into_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: {test} needs root");
        return true;
    }
    let output = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().expect("our own path"))
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    true
}

/// A network of which everything but its names is below `directory`.
pub fn network_with(directory: &tempfile::TempDir, cni_configuration: &Path, plugins: &str) -> Network {
    let network = RawNetwork {
        bridge: Some("isotest0".to_owned()),
        subnet: Some("10.77.0.0/29".to_owned()),
        subnet6: Some("fd77::/64".to_owned()),
        mtu: Some(1400),
        masquerade: Some(true),
    };
    let cni = RawCni {
        config_directory: Some(cni_configuration.into()),
        plugin_directories: Some(vec![plugins.into()]),
        ..RawCni::default()
    };
    let (root, state) = (Some(directory.path().join("root")), Some(directory.path().join("state")));
    let config = Config::check(RawConfig { root, state, network, cni, ..RawConfig::default() }).expect("valid");
    std::fs::create_dir_all(&config.root).expect("made");
    let store = Store::open(&config.root.join("state.redb")).expect("a database");
    Network::new(&config, store)
}

/// The built-in network on a database of its own.
pub fn network() -> (tempfile::TempDir, Network) {
    let directory = tempfile::tempdir().expect("a directory");
    let network = reopened(&directory);
    (directory, network)
}

/// The network of a later daemon on the same database.
pub fn reopened(directory: &tempfile::TempDir) -> Network {
    network_with(directory, Path::new("/nonexistent"), "/nonexistent")
}

/// A sandbox's id.
pub fn id(byte: u8) -> ObjectId {
    ObjectId::from_random([byte; 32])
}

/// A pod of this name with these port mappings.
pub fn pod_config(name: &str, ports: &[cri::PortMapping]) -> cri::PodSandboxConfig {
    let metadata = cri::PodSandboxMetadata { name: name.to_owned(), namespace: "ns".to_owned(), ..Default::default() };
    cri::PodSandboxConfig { metadata: Some(metadata), port_mappings: ports.to_vec(), ..Default::default() }
}

/// What a program prints.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("it runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
