//! Reading requests. Total: whatever the bytes are, each of these gives a value or EINVAL.

use std::ffi::CStr;

use isopod_proto::MAX_FUSE_MESSAGE;
use rustix::io::{Errno, Result};

/// Bytes of struct fuse_in_header.
pub const REQUEST_HEADER: usize = 40;

/// struct fuse_in_header, as far as it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole request.
    pub length: usize,
    /// What is asked.
    pub opcode: u32,
    /// The number the reply has to have.
    pub unique: u64,
    /// The file it is about.
    pub node: u64,
    /// Who asks: the owner of what is made.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl Header {
    /// Reads a header. `None`: the length is impossible, so that nobody knows where the next request begins.
    pub fn parse(bytes: &[u8; REQUEST_HEADER]) -> Option<Self> {
        let mut body = Body(bytes);
        let length = body.u32().ok()? as usize;
        let (opcode, unique) = (body.u32().ok()?, body.u64().ok()?);
        let (node, uid, gid) = (body.u64().ok()?, body.u32().ok()?, body.u32().ok()?);
        let possible = (REQUEST_HEADER..=MAX_FUSE_MESSAGE).contains(&length);
        possible.then_some(Self { length, opcode, unique, node, uid, gid })
    }
}

/// What follows the header, consumed from its front.
#[derive(Clone, Copy, Debug)]
pub struct Body<'a>(pub &'a [u8]);

impl<'a> Body<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*first)
    }

    /// The next u32.
    pub fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    /// The next u64.
    pub fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// Passes over `count` bytes.
    pub fn skip(&mut self, count: usize) -> Result<()> {
        self.0 = self.0.get(count..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// The next bytes up to a NUL, which is passed over.
    pub fn text(&mut self) -> Result<&'a CStr> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.to_bytes_with_nul().len()..];
        Ok(text)
    }

    /// The name of a file in a directory: one that leads nowhere else.
    pub fn name(&mut self) -> Result<&'a CStr> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component() {
        assert_eq!(Body(b"a b\0rest").name(), Ok(c"a b"));
        for bad in [&b"\0"[..], b".\0", b"..\0", b"a/b\0", b"/\0", b"../x\0", b"no end", b""] {
            assert_eq!(Body(bad).name(), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(Body(b"...\0").name(), Ok(c"..."));
    }

    #[test]
    fn short_bodies_are_errors() {
        assert_eq!(Body(&[1, 0, 0]).u32(), Err(Errno::INVAL));
        assert_eq!(Body(&[1, 0, 0, 0]).u64(), Err(Errno::INVAL));
        assert_eq!(Body(&[1]).skip(2), Err(Errno::INVAL));
    }

    #[test]
    fn a_header_of_impossible_length_is_none() {
        for length in [0, 39, MAX_FUSE_MESSAGE as u32 + 1, u32::MAX] {
            let mut bytes = [0; REQUEST_HEADER];
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            assert_eq!(Header::parse(&bytes), None);
        }
    }
}
