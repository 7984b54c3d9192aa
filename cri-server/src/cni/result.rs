//! Results of ADD (section 5, "Success"), of all versions from 0.3.1 to 1.1.0. They differ in keys that are not used here.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::INTERFACE;
use crate::network::pod::Dns;

/// What is used of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The addresses of the pod's interface, in the order of the result; at least one.
    pub addresses: Vec<IpAddr>,
    /// The name servers that the network has; none if it says nothing.
    pub dns: Option<Dns>,
    /// Interfaces of the pod besides loopback and [`INTERFACE`].
    pub others: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Raw {
    interfaces: Vec<RawInterface>,
    ips: Vec<RawIp>,
    dns: Dns,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawInterface {
    name: String,
    sandbox: String,
}

#[derive(Deserialize)]
struct RawIp {
    address: IpNet,
    #[serde(default)]
    interface: Option<i64>,
}

impl Outcome {
    /// Reads a result, or says what is wrong with it.
    pub fn parse(result: &Value) -> Result<Self, String> {
        let raw = Raw::deserialize(result).map_err(|error| error.to_string())?;
        let of_pod = |interface: &RawInterface| !interface.sandbox.is_empty();
        let mut addresses = Vec::new();
        for ip in raw.ips {
            // Without an index it is the pod's interface (or there is but one).
            let ours = match ip.interface {
                None | Some(..0) => true,
                Some(index) => {
                    let found = usize::try_from(index).ok().and_then(|index| raw.interfaces.get(index));
                    let interface = found.ok_or_else(|| format!("it names interface {index}, which it has not"))?;
                    of_pod(interface) && interface.name == INTERFACE
                }
            };
            if ours {
                addresses.push(ip.address.addr());
            }
        }
        if addresses.is_empty() {
            return Err(format!("it has no address for {INTERFACE}"));
        }
        let others = raw.interfaces.into_iter().filter(of_pod).map(|interface| interface.name);
        let others = others.filter(|name| name != INTERFACE && name != "lo").collect();
        Ok(Self { addresses, dns: Some(raw.dns).filter(|dns| *dns != Dns::default()), others })
    }
}
