//! Vectored I/O between descriptors and guest memory, and pages of it that go back to the host.

#![allow(unsafe_code, reason = "system calls that take the addresses of guest memory")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

use super::chain::Buffers;
use crate::virtio::GuestMemory;

const PAGE: usize = 4096;
/// Most pieces one system call takes from here.
const MAX_PIECES: usize = 256;

/// `eventfd`'s descriptor, for as long as it is open.
pub(super) fn borrow_eventfd(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the result borrows `eventfd`, which owns the descriptor and does not close it while it is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

/// Pieces of guest memory that one system call reads or writes.
pub(super) struct Pieces<'m> {
    entries: [libc::iovec; MAX_PIECES],
    count: usize,
    length: usize,
    // The entries point into memory that is mapped for 'm.
    memory: PhantomData<&'m GuestMemory>,
}

impl<'m> Pieces<'m> {
    /// The first bytes of `buffers`: as many as `limit`, there are, or fit into one system call.
    pub fn new(memory: &'m GuestMemory, buffers: &Buffers, limit: usize) -> Self {
        const NONE: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut pieces = Self { entries: [NONE; MAX_PIECES], count: 0, length: 0, memory: PhantomData };
        for slice in buffers.slices(memory) {
            if pieces.count == MAX_PIECES || pieces.length == limit {
                break;
            }
            pieces.push(&slice, limit - pieces.length);
        }
        pieces
    }

    fn push(&mut self, slice: &VolatileSlice<'m>, limit: usize) {
        let length = slice.len().min(limit);
        self.entries[self.count] = libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length };
        self.count += 1;
        self.length += length;
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.length
    }

    fn raw(&self) -> (*const libc::iovec, i32) {
        (self.entries.as_ptr(), self.count as i32)
    }
}

/// The count a system call returned, or its error.
fn checked(count: isize) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Reads from `offset` of `file` into `pieces`.
pub(super) fn read_at(file: BorrowedFd<'_>, pieces: &Pieces<'_>, offset: u64) -> io::Result<usize> {
    let (entries, count) = pieces.raw();
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `pieces` holds `count` entries that point to guest memory mapped for their lifetime, which nothing in this
    // process holds a reference to.
    checked(unsafe { libc::preadv(file.as_raw_fd(), entries, count, offset) })
}

/// Writes `pieces` at `offset` of `file`.
pub(super) fn write_at(file: BorrowedFd<'_>, pieces: &Pieces<'_>, offset: u64) -> io::Result<usize> {
    let (entries, count) = pieces.raw();
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `pieces` holds `count` entries that point to guest memory mapped for their lifetime; it is only read.
    checked(unsafe { libc::pwritev(file.as_raw_fd(), entries, count, offset) })
}

/// Writes `pieces` to `fd`.
pub(super) fn write(fd: BorrowedFd<'_>, pieces: &Pieces<'_>) -> io::Result<usize> {
    let (entries, count) = pieces.raw();
    // SAFETY: as for `write_at`.
    checked(unsafe { libc::writev(fd.as_raw_fd(), entries, count) })
}

/// Gives the whole pages of `slice` back to the host; the guest finds zeroes when it touches them again.
pub(super) fn discard(slice: &VolatileSlice<'_>) -> io::Result<()> {
    let start = slice.ptr_guard_mut().as_ptr() as usize;
    let (first, end) = (start.next_multiple_of(PAGE), (start + slice.len()) / PAGE * PAGE);
    if first >= end {
        return Ok(());
    }
    // SAFETY: the pages are within `slice`, a private mapping of guest memory that nothing in this process holds a reference to: as
    // if the guest had written zeroes.
    let done = unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_DONTNEED) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
