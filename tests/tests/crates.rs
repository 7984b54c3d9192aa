//! Which members of the workspace may use which: ARCHITECTURE.md, "The map". A new edge has to be entered there and here.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::Context;

/// Each member with the members it may depend on; `isopod-tests` and `isopod-fuzz` may use all.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("isopod-proto", &[]),
    ("isopod-jail", &[]),
    ("isopod-vmm", &["isopod-proto", "isopod-jail"]),
    ("isopod-agent", &["isopod-proto"]),
    ("isopod-fs", &["isopod-proto", "isopod-jail"]),
    ("isopod-image-store", &["isopod-proto"]),
    ("isopod-cri-server", &["isopod-proto", "isopod-image-store", "isopod-vmm"]),
];

#[test]
fn members_depend_only_on_those_they_may() -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .output()
        .context("cannot run cargo metadata")?;
    anyhow::ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("packages")?;
    let names: BTreeSet<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    assert!(names.len() >= 6, "{names:?}");

    for package in packages {
        let name = package["name"].as_str().context("a name")?;
        if matches!(name, "isopod-tests" | "isopod-fuzz") {
            continue;
        }
        let (_, allowed) =
            ALLOWED.iter().find(|(member, _)| *member == name).with_context(|| format!("{name} is new"))?;
        for dependency in package["dependencies"].as_array().context("dependencies")? {
            let used = dependency["name"].as_str().context("a dependency's name")?;
            let is_test = dependency["kind"] == "dev";
            assert!(!names.contains(used) || is_test || allowed.contains(&used), "{name} must not depend on {used}");
        }
    }
    Ok(())
}
