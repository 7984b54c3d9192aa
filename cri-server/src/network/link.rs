//! Interfaces, by rtnetlink.

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Error, Handle, LinkBridge, LinkBridgePort, LinkUnspec};
use tokio::task::JoinHandle;

use super::NetworkError;
use super::pod::Mac;

const ENODEV: i32 = -19;
const EEXIST: i32 = -17;

/// A netlink connection.
pub struct Links {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn failed(doing: &'static str, name: &str) -> impl FnOnce(Error) -> NetworkError {
    let name = name.to_owned();
    move |source| NetworkError::Interface { doing, name, source }
}

fn is(error: &Error, code: i32) -> bool {
    matches!(error, Error::NetlinkError(message) if message.raw_code() == code)
}

impl Links {
    /// Opens a connection in the daemon's network namespace.
    pub fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Netlink)?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// For other requests in the same namespace.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    async fn index(&self, name: &str) -> Result<Option<u32>, NetworkError> {
        match self.handle.link().get().match_name(name).execute().try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if is(&error, ENODEV) => Ok(None),
            Err(error) => Err(failed("look up", name)(error)),
        }
    }

    async fn needed(&self, name: &str) -> Result<u32, NetworkError> {
        self.index(name).await?.ok_or_else(|| NetworkError::NoInterface { name: name.to_owned() })
    }

    /// Whether there is an interface of this name.
    pub async fn exists(&self, name: &str) -> Result<bool, NetworkError> {
        Ok(self.index(name).await?.is_some())
    }

    /// Makes the bridge, down and without addresses, unless it is there.
    pub async fn make_bridge(&self, name: &str, mac: Mac) -> Result<(), NetworkError> {
        if self.index(name).await?.is_some() {
            return Ok(());
        }
        // With an address of its own the bridge does not take those of its ports, which come and go: the guests'
        // neighbour tables stay right.
        let message = LinkBridge::new(name).address(mac.0.to_vec()).build();
        self.handle.link().add(message).execute().await.map_err(failed("make", name))
    }

    /// Brings an interface up with these addresses. An IPv6 address is used without duplicate detection, at once.
    pub async fn bring_up(&self, name: &str, addresses: &[IpNet], mtu: Option<u32>) -> Result<(), NetworkError> {
        let index = self.needed(name).await?;
        let mut builder = LinkUnspec::new_with_index(index).up();
        if let Some(mtu) = mtu {
            builder = builder.mtu(mtu);
        }
        self.handle.link().set(builder.build()).execute().await.map_err(failed("bring up", name))?;
        for address in addresses {
            let mut request = self.handle.address().add(index, address.addr(), address.prefix_len());
            if address.addr().is_ipv6() {
                let flags = AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Permanent);
                request.message_mut().attributes.push(flags);
            }
            match request.execute().await {
                Err(error) if !is(&error, EEXIST) => return Err(failed("give an address to", name)(error)),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Makes the tap `name` a port of `bridge` and brings it up.
    pub async fn join(&self, name: &str, bridge: &str, mtu: u32) -> Result<(), NetworkError> {
        let (tap, bridge) = (self.needed(name).await?, self.needed(bridge).await?);
        let doing = "join to the bridge";
        let message = LinkUnspec::new_with_index(tap).mtu(mtu).controller(bridge).up().build();
        self.handle.link().set(message).execute().await.map_err(failed(doing, name))?;
        // Where bridged packets pass the node's rules (br_netfilter), what a pod sends to a host port or a service that is its
        // own has to go out where it came in.
        let message = LinkBridgePort::new(tap).hairpin(true).build();
        self.handle.link().set_port(message).execute().await.map_err(failed(doing, name))
    }

    /// Removes an interface. One that is not there is a success.
    pub async fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let Some(index) = self.index(name).await? else { return Ok(()) };
        match self.handle.link().del(index).execute().await {
            Err(error) if !is(&error, ENODEV) => Err(failed("remove", name)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// The names of the bridge's ports.
    pub async fn ports(&self, bridge: &str) -> Result<Vec<String>, NetworkError> {
        let Some(index) = self.index(bridge).await? else { return Ok(Vec::new()) };
        let mut links = self.handle.link().get().execute();
        let mut names = Vec::new();
        while let Some(link) = links.try_next().await.map_err(failed("list the ports of", bridge))? {
            let is_port = link.attributes.contains(&LinkAttribute::Controller(index));
            let name = link.attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            });
            names.extend(name.filter(|_| is_port));
        }
        Ok(names)
    }
}
