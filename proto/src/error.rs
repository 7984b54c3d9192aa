//! The kinds of error that cross a process boundary.

/// `error` and what it came of, in one line: what is shown where it ends.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// What sort of failure it is, for whoever has to react to it. The numbers are those of the gRPC status codes
/// (`google.rpc.Code`) that carry them on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorKind {
    /// The request itself is wrong and will never succeed.
    InvalidArgument = 3,
    /// A deadline passed before the work was done.
    DeadlineExceeded = 4,
    /// What was named does not exist.
    NotFound = 5,
    /// What was to be made exists already.
    AlreadyExists = 6,
    /// Memory, disk, addresses or another bounded thing ran out.
    ResourceExhausted = 8,
    /// The object is not in a state that allows this.
    FailedPrecondition = 9,
    /// The operation is not supported.
    Unimplemented = 12,
    /// A defect, or a system call that should not have failed.
    Internal = 13,
    /// A peer could not be reached; trying again may help.
    Unavailable = 14,
    /// Stored or received data fail their checks.
    Corrupt = 15,
}

impl ErrorKind {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The kind for a number on the wire; a number that is none of ours is [`ErrorKind::Internal`].
    pub fn from_code(code: u32) -> Self {
        match code {
            3 => Self::InvalidArgument,
            4 => Self::DeadlineExceeded,
            5 => Self::NotFound,
            6 => Self::AlreadyExists,
            8 => Self::ResourceExhausted,
            9 => Self::FailedPrecondition,
            12 => Self::Unimplemented,
            14 => Self::Unavailable,
            15 => Self::Corrupt,
            _ => Self::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for code in 0..32 {
            let kind = ErrorKind::from_code(code);
            assert!(kind == ErrorKind::Internal || kind.code() == code);
            assert_eq!(ErrorKind::from_code(kind.code()), kind);
        }
    }
}
