//! Opening a pod's tap.

use std::os::fd::OwnedFd;

use super::NetworkError;

/// Opens the tap `name`, making it. It goes with its last descriptor.
pub fn open(name: &str) -> Result<OwnedFd, NetworkError> {
    isopod_vmm::tap::open(name).map_err(|source| NetworkError::Tap { name: name.to_owned(), source })
}
