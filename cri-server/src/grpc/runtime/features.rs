//! What `Status` says isopod can do. A feature becomes true here in the change that makes it work, and nowhere else.

use crate::cri;
use crate::runtime::HANDLERS;

/// The runtime handlers with what pods of them may ask for.
pub fn handlers() -> Vec<cri::RuntimeHandler> {
    let handler = |name: &str| cri::RuntimeHandler {
        name: name.to_owned(),
        features: Some(cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true }),
    };
    HANDLERS.into_iter().map(handler).collect()
}

/// What the runtime can do for pods of every handler.
pub fn runtime() -> cri::RuntimeFeatures {
    cri::RuntimeFeatures { supplemental_groups_policy: true, user_namespaces_host_network: false }
}
