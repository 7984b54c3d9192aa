//! The Kubernetes Container Runtime Interface: messages, clients and servers, generated from `proto/cri.proto`.
#![allow(missing_docs, clippy::all, clippy::too_many_lines, reason = "generated code")]

tonic::include_proto!("runtime.v1");

/// Most bytes of a message, in both directions: what the kubelet's own client takes.
pub const MAX_MESSAGE: usize = 16 * 1024 * 1024;

impl std::fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |secret: &str| if secret.is_empty() { "" } else { "[secret]" };
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("password", &shown(&self.password))
            .field("auth", &shown(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &shown(&self.identity_token))
            .field("registry_token", &shown(&self.registry_token))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn credentials_are_not_printed() {
        let auth = AuthConfig {
            username: "user".into(),
            password: "hunter2".into(),
            auth: "aHVudGVyMg==".into(),
            server_address: "example.org".into(),
            identity_token: "hunter3".into(),
            registry_token: "hunter4".into(),
        };
        let request = PullImageRequest { auth: Some(auth), ..Default::default() };
        let printed = format!("{request:?}");
        assert!(printed.contains("user") && printed.contains("[secret]"));
        assert!(!printed.contains("hunter") && !printed.contains("aHVu"), "{printed}");
    }

    /// Bytes written down from the interface's field numbers: tag = number << 3 | wire type.
    #[test]
    fn messages_have_the_interfaces_bytes() {
        let version = VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "a".into(),
            runtime_version: "b".into(),
            runtime_api_version: "v1".into(),
        };
        assert_eq!(version.encode_to_vec(), b"\x0a\x050.1.0\x12\x01a\x1a\x01b\x22\x02v1");

        let metadata = PodSandboxMetadata { name: "n".into(), uid: "u".into(), namespace: "s".into(), attempt: 3 };
        assert_eq!(metadata.encode_to_vec(), b"\x0a\x01n\x12\x01u\x1a\x01s\x20\x03");

        let image = ImageSpec { image: "i".into(), user_specified_image: "u".into(), ..Default::default() };
        assert_eq!(image.encode_to_vec(), b"\x0a\x01i\x92\x01\x01u");

        let context = LinuxContainerSecurityContext {
            run_as_group: Some(Int64Value { value: 5 }),
            supplemental_groups_policy: SupplementalGroupsPolicy::Strict.into(),
            ..Default::default()
        };
        assert_eq!(context.encode_to_vec(), b"\x62\x02\x08\x05\x88\x01\x01");

        let config = ContainerConfig { tty: true, stop_signal: Signal::Sigterm.into(), ..Default::default() };
        assert_eq!(config.encode_to_vec(), b"\x70\x01\x90\x01\x17");

        let status = ContainerStatus { exit_code: 137, image_id: "i".into(), ..Default::default() };
        assert_eq!(status.encode_to_vec(), b"\x38\x89\x01\x8a\x01\x01i");
    }

    #[test]
    fn a_field_for_windows_is_read_over() {
        let bytes = b"\x12\x01h\x4a\x02\x0a\x00\x1a\x01d";
        let config = PodSandboxConfig::decode(bytes.as_slice()).expect("unknown fields are no error");
        assert_eq!((config.hostname.as_str(), config.log_directory.as_str()), ("h", "d"));
    }
}
