//! The network device (virtio 1.2, section 5.1) on a tap.
//!
//! The header before each packet (5.1.6) is the same on the tap as in the queues, so that checksums and segmentation are
//! left to whoever does them best. Packets to the host go straight from guest memory; packets to the guest are read into a
//! buffer first, as only then is it known how many of the guest's buffers they take.

mod device;
mod worker;

pub use device::{Net, NetError};
