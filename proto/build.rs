//! Generates the Rust types of `proto/*.proto` with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = ["proto/agent.proto", "proto/stream.proto", "proto/vmm.proto", "proto/file_server.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let service = std::env::var_os("CARGO_FEATURE_AGENT_SERVICE").is_some();
    tonic_prost_build::configure()
        .build_client(service)
        .build_server(service)
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
