//! What every sandbox's driver works with.

use isopod_image_store::ImageStore;

use crate::config::Config;
use crate::index::Index;
use crate::network::Network;
use crate::sandbox::users::Users;
use crate::store::Store;
use crate::volume::mirror::watch::Watches;

/// The daemon's parts.
pub struct Context {
    /// The configuration.
    pub config: Config,
    /// The state database.
    pub store: Store,
    /// The images.
    pub images: ImageStore,
    /// The pods' network.
    pub network: Network,
    /// Which users the VMMs are.
    pub users: Users,
    /// What clients are shown.
    pub index: Index,
    /// What tells of changes of the host's directories.
    pub watches: Watches,
}
