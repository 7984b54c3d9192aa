//! The driver's requests (virtio 1.2, 5.15.6): 24 bytes that the device reads, 10 that it writes.

use super::blocks::State;

/// Bytes of a request: type, padding, address, number of blocks, padding.
pub(super) const REQUEST_BYTES: usize = 24;
/// Bytes of a response: type, padding, state.
pub(super) const RESPONSE_BYTES: usize = 10;

/// What the driver asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// These blocks become `State::Plugged` or `State::Unplugged`.
    Set { to: State, address: u64, count: u16 },
    /// The guest gives all blocks back.
    UnplugAll,
    /// The state of these blocks.
    State { address: u64, count: u16 },
}

impl Request {
    /// `None`: there is no such request.
    pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let kind = u16::from_le_bytes([bytes[0], bytes[1]]);
        let address = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
        let count = u16::from_le_bytes([bytes[16], bytes[17]]);
        Some(match kind {
            0 => Self::Set { to: State::Plugged, address, count },
            1 => Self::Set { to: State::Unplugged, address, count },
            2 => Self::UnplugAll,
            3 => Self::State { address, count },
            _ => return None,
        })
    }
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Ack,
    /// Not now: more than was requested.
    Nack,
    /// The host cannot at the moment.
    Busy,
    Error,
    State(State),
}

impl Response {
    pub fn to_bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
        };
        let mut bytes = [0; RESPONSE_BYTES];
        (bytes[0], bytes[8]) = (kind, state);
        bytes
    }
}
