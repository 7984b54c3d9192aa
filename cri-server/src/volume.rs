//! Volumes: what a container has mounted besides its root, and where on the host it comes from.
//!
//! | CRI mount | in the guest |
//! |---|---|
//! | a directory or file of the host | a bind mount of a share of the pod's file server ([`server`]), which works on the host's own file |
//! | a ConfigMap, Secret, projected or downward-API volume of the kubelet | a bind mount of a copy in the guest's memory, which follows the host's ([`mirror`]) |
//! | an emptyDir volume of the kubelet | a bind mount of a file system of the pod's own: on a disk that is a file in the volume's directory, or in the guest's memory ([`empty_dir`]) |
//! | an image | its disk, as for a container's root, read-only |
//! | (a device of `config.devices`) | a disk, for a block device; otherwise the guest's own device of that name ([`device`]) |
//!
//! [`plan`] says, without looking at the host, what a mount asks for; [`host`] finds a host path and takes its tree; the
//! sandbox's driver puts both together (`sandbox/volumes.rs`). What a container's volumes hold on the host goes with the
//! container.

pub mod device;
pub mod empty_dir;
pub mod host;
pub mod kubelet;
pub mod mirror;
pub(crate) mod mountinfo;
pub mod plan;
pub mod server;
