//! The headers of FUSE messages (linux/fuse.h): all of them that the device looks at.

use isopod_proto::MAX_FUSE_MESSAGE;

/// Bytes of struct fuse_in_header.
pub(super) const REQUEST_HEADER: usize = 40;
/// Bytes of struct fuse_out_header.
pub(super) const REPLY_HEADER: usize = 16;

/// Operations without a reply.
const FUSE_FORGET: u32 = 2;
const FUSE_BATCH_FORGET: u32 = 42;

/// The beginning of a request, from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    /// The guest's number of it.
    pub unique: u64,
    /// Whether the server answers it.
    pub answered: bool,
}

impl Request {
    /// Reads the header of a request that is `total` bytes long. `None`: it is none, or says another length.
    pub fn parse(header: &[u8; REQUEST_HEADER], total: usize) -> Option<Self> {
        let length = u32::from_le_bytes(*header.first_chunk()?);
        let opcode = u32::from_le_bytes(header[4..8].try_into().ok()?);
        let unique = u64::from_le_bytes(header[8..16].try_into().ok()?);
        let valid = length as usize == total && total <= MAX_FUSE_MESSAGE;
        valid.then_some(Self { unique, answered: !matches!(opcode, FUSE_FORGET | FUSE_BATCH_FORGET) })
    }
}

/// The beginning of a reply, from the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    /// The request it answers.
    pub unique: u64,
    /// Bytes of all of it.
    pub length: usize,
}

impl Reply {
    /// Reads the header of a reply. `None`: it cannot be one.
    pub fn parse(header: &[u8; REPLY_HEADER]) -> Option<Self> {
        let length = u32::from_le_bytes(*header.first_chunk()?) as usize;
        let unique = u64::from_le_bytes(*header.last_chunk()?);
        (REPLY_HEADER..=MAX_FUSE_MESSAGE).contains(&length).then_some(Self { unique, length })
    }
}

/// A reply that says only that `errno` happened.
pub(super) fn failure(unique: u64, errno: i32) -> [u8; REPLY_HEADER] {
    let mut reply = [0; REPLY_HEADER];
    reply[..4].copy_from_slice(&(REPLY_HEADER as u32).to_le_bytes());
    reply[4..8].copy_from_slice(&(-errno).to_le_bytes());
    reply[8..].copy_from_slice(&unique.to_le_bytes());
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(length: u32, opcode: u32, unique: u64) -> [u8; REQUEST_HEADER] {
        let mut header = [0; REQUEST_HEADER];
        header[..4].copy_from_slice(&length.to_le_bytes());
        header[4..8].copy_from_slice(&opcode.to_le_bytes());
        header[8..16].copy_from_slice(&unique.to_le_bytes());
        header
    }

    #[test]
    fn a_request_is_as_long_as_its_chain_or_none() {
        assert_eq!(Request::parse(&header(48, 3, 7), 48), Some(Request { unique: 7, answered: true }));
        for (length, total) in [(48, 47), (48, 49), (0, 40), (u32::MAX, 40)] {
            assert_eq!(Request::parse(&header(length, 3, 7), total), None);
        }
        let much = MAX_FUSE_MESSAGE + 1;
        assert_eq!(Request::parse(&header(much as u32, 16, 7), much), None);
    }

    #[test]
    fn forgetting_has_no_answer() {
        for opcode in [FUSE_FORGET, FUSE_BATCH_FORGET] {
            assert!(!Request::parse(&header(48, opcode, 1), 48).unwrap().answered);
        }
    }

    #[test]
    fn a_reply_has_bounds() {
        assert_eq!(Reply::parse(&failure(9, 5)), Some(Reply { unique: 9, length: REPLY_HEADER }));
        for bad in [0, 15, MAX_FUSE_MESSAGE as u32 + 1, u32::MAX] {
            let mut reply = failure(9, 5);
            reply[..4].copy_from_slice(&bad.to_le_bytes());
            assert_eq!(Reply::parse(&reply), None);
        }
    }
}
