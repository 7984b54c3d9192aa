//! What a client of CRI asks for.

use isopod_image_store::ImageConfig;
use isopod_proto::ObjectId;
use prost::Message;

use crate::container::{
    check, check_sandbox, create_request, explicit_resources, guest_resources, merged_resources, stop_signal,
    user_namespace, user_namespace_of_options,
};
use crate::cri;
use crate::network::ports;
use crate::sandbox::size::{self, Size};
use crate::volume::plan;

/// The configuration of a sandbox or a container, as the first byte says.
pub fn specs(input: &[u8]) {
    let Some((kind, input)) = input.split_first() else { return };
    match kind % 3 {
        0 => sandbox(input),
        1 => container(input),
        _ => resources(input),
    }
}

fn sandbox(input: &[u8]) {
    let Ok(config) = cri::PodSandboxConfig::decode(input) else { return };
    let _ = ports::parse(&config.port_mappings);
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.clone().unwrap_or_default();
    let _ = user_namespace_of_options(context.namespace_options.as_ref());
    let vmm = crate::config::Config::check(Default::default()).expect("the default is right").vmm;
    let host = Size { vcpus: 4, memory_bytes: 64 << 30 };
    let size = size::of(config.linux.as_ref(), &vmm, host);
    assert_eq!(size.or(size::largest(size, &vmm, host)), size::largest(size, &vmm, host));
    assert!((1..=64).contains(&size.vcpus) && size.memory_bytes.is_multiple_of(2 << 20) && size.memory_bytes > 0);
    if check_sandbox(&config).is_ok() {
        let text = crate::sandbox::files::resolv_conf(config.dns_config.as_ref(), None, "nameserver 1.1.1.1\n");
        assert!(!text.contains('\0'));
    }
}

fn container(input: &[u8]) {
    let Ok(config) = cri::ContainerConfig::decode(input) else { return };
    let _ = plan::plan(&config.mounts);
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.clone().unwrap_or_default();
    let _ = user_namespace_of_options(context.namespace_options.as_ref());
    let _ = stop_signal(&config, "SIGTERM");
    let _ = check(&config);
    let id = ObjectId::from_random([1; 32]);
    let image = ImageConfig::default();
    if let Ok(request) = create_request(&id, &config, ("sha256:00", &image), "host", None) {
        assert_eq!(request.id, id.to_string());
    }
    let _ = user_namespace;
}

fn resources(input: &[u8]) {
    let Ok(limits) = cri::LinuxContainerResources::decode(input) else { return };
    let _ = guest_resources(&limits);
    let explicit = explicit_resources(&limits);
    let _ = merged_resources(&limits, &explicit);
    let host = Size { vcpus: 4, memory_bytes: 64 << 30 };
    let size = size::of_containers([&limits, &explicit].into_iter(), host);
    assert!(size.vcpus <= 4 && size.memory_bytes.is_multiple_of(2 << 20));
}
