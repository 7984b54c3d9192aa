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
