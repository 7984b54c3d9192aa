//! Generates the Rust types of `proto/*.proto` with protox, so that no protoc is needed.

/// What is kept in the state database and printed as verbose info.
const SERIALIZED: [&str; 25] = [
    "PodSandboxMetadata",
    "PodSandboxConfig",
    "LinuxPodSandboxConfig",
    "LinuxSandboxSecurityContext",
    "DNSConfig",
    "PortMapping",
    "NamespaceOption",
    "UserNamespace",
    "SecurityProfile",
    "SELinuxOption",
    "Int64Value",
    "KeyValue",
    "IDMapping",
    "ContainerMetadata",
    "ContainerConfig",
    "ImageSpec",
    "Mount",
    "Device",
    "CDIDevice",
    "LinuxContainerConfig",
    "LinuxContainerResources",
    "HugepageLimit",
    "LinuxContainerSecurityContext",
    "Capability",
    "LinuxContainerUser",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/cri.proto", "proto/images.proto"], ["proto"])?;
    let mut builder = tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .build_transport(true)
        // It holds secrets; `lib.rs` has a Debug for it that shows none.
        .skip_debug(["runtime.v1.AuthConfig"]);
    for message in SERIALIZED {
        builder = builder.type_attribute(
            format!("runtime.v1.{message}"),
            "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]",
        );
    }
    builder.compile_fds(descriptors)?;
    Ok(())
}
