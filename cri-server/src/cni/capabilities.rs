//! What a pod tells plugins: arguments, and the capabilities of the conventions (CONVENTIONS.md, "Dynamic plugin specific fields").

use isopod_proto::ObjectId;
use serde_json::{Map, Value, json};

use super::{CniError, NetworkList};
use crate::cri;
use crate::network::ports::HostPort;

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// What plugins are told of a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct PodArguments {
    /// CNI_ARGS.
    pub arguments: String,
    /// Capability to what it is told; a plugin gets those that it asks for.
    pub runtime_config: Map<String, Value>,
}

impl PodArguments {
    /// Those of the pod that `config` describes, for `list`. A pod that needs a capability that no plugin has is refused.
    pub fn of(
        list: &NetworkList,
        sandbox: &ObjectId,
        config: &cri::PodSandboxConfig,
        ports: &[HostPort],
    ) -> Result<Self, CniError> {
        let metadata = config.metadata.clone().unwrap_or_default();
        let mut arguments = "IgnoreUnknown=1".to_owned();
        for (key, value) in [
            ("K8S_POD_NAMESPACE", metadata.namespace.as_str()),
            ("K8S_POD_NAME", &metadata.name),
            ("K8S_POD_INFRA_CONTAINER_ID", sandbox.as_str()),
            ("K8S_POD_UID", &metadata.uid),
        ] {
            // It would be another argument.
            if value.contains([';', '=', '\0']) {
                return Err(CniError::Request(format!("{value:?} cannot be told to CNI plugins as {key}")));
            }
            arguments += &format!(";{key}={value}");
        }
        let mut runtime_config = Map::new();
        if !ports.is_empty() {
            if !list.takes("portMappings") {
                let problem = format!(
                    "the pod has host ports, but no plugin of the CNI network {} has the capability portMappings",
                    list.name
                );
                return Err(CniError::Request(problem));
            }
            runtime_config.insert("portMappings".to_owned(), ports.iter().map(port_mapping).collect());
        }
        if let Some(bandwidth) = bandwidth(config)? {
            if !list.takes("bandwidth") {
                tracing::warn!(
                    network = list.name,
                    "no CNI plugin limits the bandwidth that the pod's annotations ask for"
                );
            }
            runtime_config.insert("bandwidth".to_owned(), bandwidth);
        }
        if let Some(dns) = &config.dns_config {
            let dns = json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
            runtime_config.insert("dns".to_owned(), dns);
        }
        if !config.annotations.is_empty() {
            // As containerd calls it.
            runtime_config.insert("io.kubernetes.cri.pod-annotations".to_owned(), json!(config.annotations));
        }
        Ok(Self { arguments, runtime_config })
    }
}

fn port_mapping(port: &HostPort) -> Value {
    json!({
        "hostPort": port.host_port,
        "containerPort": port.container_port,
        "protocol": port.protocol,
        "hostIP": port.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
    })
}

/// The annotations of Kubernetes for bandwidth, in bits per second; bursts are not limited, as elsewhere.
fn bandwidth(config: &cri::PodSandboxConfig) -> Result<Option<Value>, CniError> {
    let mut limits = Map::new();
    for (annotation, direction) in [(INGRESS, "ingress"), (EGRESS, "egress")] {
        let Some(text) = config.annotations.get(annotation) else { continue };
        let rate = quantity(text).filter(|rate| *rate > 0).ok_or_else(|| {
            let shown: String = text.chars().take(40).collect();
            CniError::Request(format!("the annotation {annotation} is {shown:?}, which is not a rate such as 10M"))
        })?;
        limits.insert(format!("{direction}Rate"), rate.into());
        limits.insert(format!("{direction}Burst"), u32::MAX.into());
    }
    Ok(if limits.is_empty() { None } else { Some(Value::Object(limits)) })
}

/// A quantity of Kubernetes that is a whole number: digits and a suffix.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_those_of_kubernetes() {
        let all = ["1", "10M", "2Ki", "1G"].map(quantity);
        assert_eq!(all, [Some(1), Some(10_000_000), Some(2048), Some(1_000_000_000)]);
        for bad in ["", "M", "1m", "-1", "1.5M", "+1", "99999999999999T", "1MM"] {
            assert_eq!(quantity(bad), None, "{bad}");
        }
    }
}
