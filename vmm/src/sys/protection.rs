//! Who can access a part of the guest's memory: everybody, or nobody.

use std::io;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// Lets guest and devices access `length` bytes at `offset` of `region`, which are zeroes if they were closed before.
pub fn open(region: &GuestRegionMmap<()>, offset: u64, length: u64) -> io::Result<()> {
    protect(region, offset, length, libc::PROT_READ | libc::PROT_WRITE)
}

/// Lets nobody access them, and frees what they hold. After an error they are as they were.
pub fn close(region: &GuestRegionMmap<()>, offset: u64, length: u64) -> io::Result<()> {
    protect(region, offset, length, libc::PROT_NONE)?;
    let address = address(region, offset, length)?;
    // SAFETY: these bytes are of a private mapping of the guest's memory, to which nothing holds a reference; that they read as
    // zeroes from now on, no access sees, as there is none until they are opened again.
    let freed = unsafe { libc::madvise(address, length as usize, libc::MADV_DONTNEED) };
    if freed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn address(region: &GuestRegionMmap<()>, offset: u64, length: u64) -> io::Result<*mut libc::c_void> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let bytes = usize::try_from(length).map_err(|_| outside())?;
    let slice = region.get_slice(MemoryRegionAddress(offset), bytes).map_err(|_| outside())?;
    Ok(slice.ptr_guard_mut().as_ptr().cast())
}

fn protect(region: &GuestRegionMmap<()>, offset: u64, length: u64, protection: i32) -> io::Result<()> {
    let address = address(region, offset, length)?;
    // SAFETY: the range is within one live mapping of the guest's memory. Nothing holds a reference to it: devices copy by volatile
    // accesses and system calls, and one to what is closed ends the process or is an error.
    let changed = unsafe { libc::mprotect(address, length as usize, protection) };
    if changed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
