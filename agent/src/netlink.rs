//! The four rtnetlink requests a pod needs (rtnetlink(7)): a link's name, size and state, addresses, and routes.
//!
//! The general crates for this bring parsers for every attribute there is, and half a megabyte; the agent only asks and reads
//! the acknowledgement.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// The kernel answers at once; a socket that does not is broken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A socket for rtnetlink requests.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// An address or network: address and prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The address.
    pub address: IpAddr,
    /// Number of leading bits, at most those the address has.
    pub length: u8,
}

impl Prefix {
    /// Reads "10.88.0.5/16".
    pub fn parse(text: &str) -> Option<Self> {
        let (address, length) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let length = length.parse().ok()?;
        (length <= if address.is_ipv4() { 32 } else { 128 }).then_some(Self { address, length })
    }
}

/// A message under construction: header, fixed part, attributes.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(fixed);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).expect("attributes are short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).expect("requests are short");
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

impl Netlink {
    /// A socket in the current network namespace.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let kind = SocketType::RAW;
        // Protocol 0 of this family is NETLINK_ROUTE.
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, kind, flags, None)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Gives the link, which must be down, another name.
    pub fn rename(&mut self, index: u32, name: &str) -> io::Result<()> {
        let name = [name.as_bytes(), &[0]].concat();
        self.ask(Request::new(RTM_NEWLINK, 0, &link(index, 0)).attribute(IFLA_IFNAME, &name))
    }

    /// Sets the link's MTU.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        self.ask(Request::new(RTM_NEWLINK, 0, &link(index, 0)).attribute(IFLA_MTU, &mtu.to_ne_bytes()))
    }

    /// Switches the link on.
    pub fn set_up(&mut self, index: u32) -> io::Result<()> {
        self.ask(Request::new(RTM_NEWLINK, 0, &link(index, IFF_UP)))
    }

    /// Adds an address; an IPv6 one without duplicate detection, so that it can be used at once.
    pub fn add_address(&mut self, index: u32, prefix: Prefix) -> io::Result<()> {
        let Prefix { address, length } = prefix;
        let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
        let mut fixed = vec![family(address), length, flags, 0];
        fixed.extend(index.to_ne_bytes());
        let mut request = Request::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(IFA_LOCAL, &bytes(address))
            .attribute(IFA_ADDRESS, &bytes(address));
        if let IpAddr::V4(address) = address
            && length < 31
        {
            let broadcast = u32::from(address) | (u32::MAX >> length);
            request = request.attribute(IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        self.ask(request)
    }

    /// Adds a route to `destination` by the link, through `gateway` if there is one.
    pub fn add_route(&mut self, destination: Prefix, gateway: Option<IpAddr>, index: u32) -> io::Result<()> {
        let scope = if gateway.is_none() && destination.address.is_ipv4() { RT_SCOPE_LINK } else { RT_SCOPE_UNIVERSE };
        let family = family(destination.address);
        let mut fixed = vec![family, destination.length, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST];
        fixed.extend([0; 4]);
        let mut request =
            Request::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed).attribute(RTA_OIF, &index.to_ne_bytes());
        if destination.length > 0 {
            request = request.attribute(RTA_DST, &bytes(destination.address));
        }
        if let Some(gateway) = gateway {
            request = request.attribute(RTA_GATEWAY, &bytes(gateway));
        }
        self.ask(request)
    }

    fn ask(&mut self, request: Request) -> io::Result<()> {
        self.sequence += 1;
        let request = request.finish(self.sequence);
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &request, SendFlags::empty(), &kernel)?;
        let mut answer = [0; 8192];
        let (_, length) = rustix::net::recv(&self.socket, &mut answer, RecvFlags::empty())?;
        acknowledged(&answer[..length.min(8192)], self.sequence)
    }
}

/// struct ifinfomsg: family, padding, type, index, flags, and which flags change.
fn link(index: u32, flags: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), flags.to_ne_bytes()].concat()
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { 2 } else { 10 }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What an NLMSG_ERROR answer says: header of 16 bytes, then a negative errno or 0.
fn acknowledged(answer: &[u8], sequence: u32) -> io::Result<()> {
    let field = |range: std::ops::Range<usize>| answer.get(range).and_then(|bytes| bytes.try_into().ok());
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let (answered, code) = (field(8..12).map(u32::from_ne_bytes), field(16..20).map(i32::from_ne_bytes));
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) if answered == Some(sequence) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) if code < 0 => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_read() {
        let prefix = Prefix::parse("10.88.0.5/16").unwrap();
        assert_eq!((prefix.address.to_string().as_str(), prefix.length), ("10.88.0.5", 16));
        assert!(Prefix::parse("::/0").is_some());
        for bad in ["", "10.0.0.1", "10.0.0.1/33", "fd00::1/129", "x/1", "10.0.0.1/-1"] {
            assert!(Prefix::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn requests_are_padded_and_carry_their_length() {
        let bytes = Request::new(RTM_NEWLINK, 0, &link(2, IFF_UP)).attribute(IFLA_IFNAME, b"eth0\0").finish(7);
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(u32::from_ne_bytes(bytes[0..4].try_into().unwrap()), 44);
        assert_eq!(&bytes[32..36], &[9, 0, 3, 0]);
    }

    #[test]
    fn answers_that_are_cut_off_are_errors() {
        let mut answer = Request::new(NLMSG_ERROR, 0, &0i32.to_ne_bytes()).finish(3);
        assert!(acknowledged(&answer, 3).is_ok());
        assert!(acknowledged(&answer, 4).is_err());
        for cut in 0..answer.len() {
            assert!(acknowledged(&answer[..cut], 3).is_err());
        }
        answer[16..20].copy_from_slice(&(-libc::EEXIST).to_ne_bytes());
        assert_eq!(acknowledged(&answer, 3).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    }
}
