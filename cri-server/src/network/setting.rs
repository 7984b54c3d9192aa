//! The node's kernel settings that pods' networks need.

use std::path::Path;

use super::NetworkError;

const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// Writes a kernel setting.
pub fn set(path: &Path, value: &str) -> Result<(), NetworkError> {
    std::fs::write(path, value).map_err(|source| NetworkError::Setting { path: path.into(), source })
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Whether the node has IPv6, and has not switched it off.
pub fn has_ipv6() -> bool {
    read(&Path::new(IPV6).join("all/disable_ipv6")) == "0"
}

/// Makes the node route IPv6, and the bridge one of its interfaces for it.
pub fn for_bridge_ipv6(bridge: &str) -> Result<(), NetworkError> {
    let all = Path::new(IPV6);
    if read(&all.join("all/forwarding")) != "1" {
        keep_advertised_routes(all)?;
        set(&all.join("all/forwarding"), "1")?;
    }
    let bridge = all.join(bridge);
    // Pods are no routers; and the first pod must not wait until the bridge has looked for its link-local address's double.
    for (name, value) in [("disable_ipv6", "0"), ("accept_ra", "0"), ("accept_dad", "0")] {
        set(&bridge.join(name), value)?;
    }
    Ok(())
}

/// An interface that learns its routes from router advertisements (accept_ra = 1) forgets them when the node becomes a router,
/// unless told otherwise (2): see ip-sysctl in the kernel's documentation.
fn keep_advertised_routes(all: &Path) -> Result<(), NetworkError> {
    let failed = |source| NetworkError::Setting { path: all.into(), source };
    for entry in std::fs::read_dir(all).map_err(failed)? {
        let path = entry.map_err(failed)?.path().join("accept_ra");
        if read(&path) == "1" {
            set(&path, "2")?;
        }
    }
    Ok(())
}
