//! Opening a tap interface.

mod sys;

use std::io;
use std::os::fd::OwnedFd;

use isopod_proto::ErrorKind;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Bytes of the header before each packet: struct virtio_net_hdr_v1 (virtio 1.2, section 5.1.6).
pub const VNET_HEADER_BYTES: usize = 12;
/// Most bytes of an interface's name (IFNAMSIZ without the end).
const MAX_NAME: usize = 15;

/// Why a tap cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface can have the name.
    #[error("{name:?} is no name of an interface: it must have 1 to 15 bytes without '/', white space and NUL")]
    InvalidName {
        /// The name, shortened.
        name: String,
    },
    /// A system call failed.
    #[error("cannot open the tap {name}: {what} failed")]
    System {
        /// The interface.
        name: String,
        /// The call.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl TapError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        let Self::System { source, .. } = self else { return ErrorKind::InvalidArgument };
        match Errno::from_io_error(source) {
            Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => ErrorKind::NotFound,
            Some(Errno::BUSY) => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        }
    }
}

/// Opens the tap `name` of the caller's network namespace, making it if it is not there: whole Ethernet frames, each after
/// a header of [`VNET_HEADER_BYTES`], and reads and writes that never block. A tap that this made goes with its last
/// descriptor.
pub fn open(name: &str) -> Result<OwnedFd, TapError> {
    let allowed = |byte: u8| byte != 0 && byte != b'/' && !byte.is_ascii_whitespace();
    if !(1..=MAX_NAME).contains(&name.len()) || !name.bytes().all(allowed) || name == "." || name == ".." {
        return Err(TapError::InvalidName { name: name.chars().take(80).collect() });
    }
    let failed = |what| move |source| TapError::System { name: name.to_owned(), what, source };
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
        .map_err(|errno| failed("opening /dev/net/tun")(errno.into()))?;
    sys::attach(&tap, name).map_err(failed("TUNSETIFF"))?;
    sys::set_header_size(&tap, VNET_HEADER_BYTES).map_err(failed("TUNSETVNETHDRSZ"))?;
    Ok(tap)
}

#[cfg(not(feature = "fuzzing"))]
pub(crate) use sys::{set_header_size, set_offloads};

/// The fuzzer's tap is a socket, which has no such settings.
#[cfg(feature = "fuzzing")]
pub(crate) fn set_header_size(_: &OwnedFd, _: usize) -> io::Result<()> {
    Ok(())
}

/// As above.
#[cfg(feature = "fuzzing")]
pub(crate) fn set_offloads(_: &OwnedFd, _: u32) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_has_are_refused() {
        for name in ["", "a/b", "a\0b", "a b", "sixteen-bytes-xx", ".", ".."] {
            let error = open(name).unwrap_err();
            assert!(matches!(error, TapError::InvalidName { .. }), "{name}");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }
}
