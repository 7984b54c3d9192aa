//! Interfaces, by rtnetlink.

use std::net::Ipv4Addr;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Error, Handle, LinkBridge, LinkUnspec};
use tokio::task::JoinHandle;

use super::NetworkError;

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

    /// Makes the bridge with this address, or makes the one that is there right.
    pub async fn bridge(
        &self,
        name: &str,
        mac: [u8; 6],
        address: Ipv4Addr,
        prefix: u8,
        mtu: u32,
    ) -> Result<(), NetworkError> {
        if self.index(name).await?.is_none() {
            // With an address of its own the bridge does not take those of its ports, which come and go: the guests'
            // neighbour tables stay right.
            let message = LinkBridge::new(name).address(mac.to_vec()).build();
            self.handle.link().add(message).execute().await.map_err(failed("make", name))?;
        }
        let index = self.needed(name).await?;
        let message = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        self.handle.link().set(message).execute().await.map_err(failed("bring up", name))?;
        match self.handle.address().add(index, address.into(), prefix).execute().await {
            Err(error) if !is(&error, EEXIST) => Err(failed("give an address to", name)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Makes the tap `name` a port of `bridge` and brings it up.
    pub async fn join(&self, name: &str, bridge: &str, mtu: u32) -> Result<(), NetworkError> {
        let (tap, bridge) = (self.needed(name).await?, self.needed(bridge).await?);
        let message = LinkUnspec::new_with_index(tap).mtu(mtu).controller(bridge).up().build();
        self.handle.link().set(message).execute().await.map_err(failed("join to the bridge", name))
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
