//! The ioctls of taps.

#![allow(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes `tap` a descriptor of the tap `name`, which has at most 15 bytes.
pub(super) fn attach(tap: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
        },
    };
    for (place, byte) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    // SAFETY: TUNSETIFF reads and writes a struct ifreq, which `request` is and which outlives the call; its name ends with
    // a NUL, as the last byte was not written.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })
}

/// Sets how long the header before each packet is.
pub(crate) fn set_header_size(tap: &OwnedFd, bytes: usize) -> io::Result<()> {
    let bytes = bytes as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which `bytes` is and which outlives the call.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const bytes) })
}

#[cfg(not(feature = "fuzzing"))]
/// Sets the offloads: what packets without checksum, and longer than the MTU, may be read from `tap`.
pub(crate) fn set_offloads(tap: &OwnedFd, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes flags and no address.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) })
}
