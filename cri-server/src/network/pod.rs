//! What a pod has of its network: kept in the sandbox's record, given to the guest, shown in the status.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A pod's interface as the guest is to have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// The guest's MAC address.
    pub mac: Mac,
    /// Its addresses, each with the prefix of its network. The first one is the pod's address in CRI's status.
    pub addresses: Vec<IpNet>,
    /// Its routes.
    pub routes: Vec<PodRoute>,
    /// Its MTU.
    pub mtu: u32,
    /// What a CNI plugin says of name servers; used where the pod's own configuration says nothing.
    #[serde(default)]
    pub dns: Option<Dns>,
}

/// A route of the guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRoute {
    /// Where to.
    pub destination: IpNet,
    /// By whom; none for a destination on the link.
    pub gateway: Option<IpAddr>,
}

/// Name servers as CNI describes them (CNI specification 1.1, "Success", key `dns`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of name servers.
    pub nameservers: Vec<String>,
    /// The local domain.
    pub domain: String,
    /// Domains that short names are looked up in.
    pub search: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

impl PodNetwork {
    /// The addresses alone, in the order of the status.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().map(IpNet::addr)
    }
}

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address that goes with an IPv4 address: locally administered, so that it is nobody else's.
    pub fn of(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x0a, 0x58, a, b, c, d])
    }

    /// The IPv6 link-local address that an interface with this address gives itself (RFC 4291, appendix A).
    pub fn link_local(self) -> std::net::Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f].into()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// A text that is not the MAC address of one Ethernet interface.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a MAC address of an interface")]
pub struct InvalidMac {
    /// The text, shortened.
    text: String,
}

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let invalid = || InvalidMac { text: text.chars().take(40).collect() };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(invalid)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        // A group address, or none, is nobody's source.
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(invalid());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, InvalidMac> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_of_an_address_is_local_and_unicast() {
        let mac = Mac::of(Ipv4Addr::new(10, 88, 0, 5));
        assert_eq!(mac.to_string(), "0a:58:0a:58:00:05");
        assert_eq!(mac.0[0] & 0b11, 0b10);
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert_eq!(mac.link_local().to_string(), "fe80::858:aff:fe58:5");
    }

    #[test]
    fn what_is_no_mac_of_an_interface_is_refused() {
        for bad in ["", "0a:58", "0a:58:0a:58:00:05:06", "0a-58-0a-58-00-05", "+a:58:0a:58:00:05", "ff:ff:ff:ff:ff:ff"]
        {
            // "+a" is what from_str_radix would take.
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        assert!("00:00:00:00:00:00".parse::<Mac>().is_err() && "01:00:5e:00:00:01".parse::<Mac>().is_err());
    }
}
