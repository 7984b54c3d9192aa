//! Errors as gRPC statuses: the only place that makes a [`tonic::Status`].

use std::error::Error;

use isopod_proto::ErrorKind;
pub use isopod_proto::chain;
use tonic::{Code, Status};

/// What the kubelet looks for in the errors of PullImage.
const PULL_WORDS: [&str; 2] = ["RegistryUnavailable", "SignatureValidationFailed"];

/// An error that knows what sort it is.
pub trait Failure: Error {
    /// What sort.
    fn kind(&self) -> ErrorKind;
}

macro_rules! failures {
    ($($error:ty),* $(,)?) => {
        $(impl Failure for $error {
            fn kind(&self) -> ErrorKind {
                <$error>::kind(self)
            }
        })*
    };
}

failures!(
    isopod_image_store::PullError,
    isopod_image_store::ImportError,
    isopod_image_store::StoreError,
    isopod_image_store::AuthError,
    isopod_image_store::ReferenceError,
    crate::container::SpecError,
    crate::events::Lagged,
    crate::index::LookupError,
    crate::sandbox::SandboxError,
    crate::streaming::requests::RequestError,
);

/// The code for `kind`.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::Unimplemented => Code::Unimplemented,
        ErrorKind::Internal => Code::Internal,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Corrupt => Code::DataLoss,
    }
}

/// The status for `error`.
pub fn of(error: &impl Failure) -> Status {
    Status::new(code(error.kind()), chain(error))
}

/// The status for a failed pull. The kubelet reads the words its message begins with only if the code is Unknown (cri-api
/// `pkg/errors`); a deadline, which it does not look for, stays one.
pub fn of_pull(error: &isopod_image_store::PullError) -> Status {
    let message = chain(error);
    let has_word = PULL_WORDS.iter().any(|word| message.starts_with(word));
    Status::new(if has_word { Code::Unknown } else { code(error.kind()) }, message)
}

/// The status of a call that this runtime does not have.
pub fn unimplemented(call: &str) -> Status {
    Status::new(Code::Unimplemented, format!("isopod does not implement {call}"))
}

/// The status of a request that can never succeed.
pub fn invalid(message: impl Into<String>) -> Status {
    Status::new(Code::InvalidArgument, message)
}

/// The status of a defect of ours.
pub fn internal(message: impl Into<String>) -> Status {
    Status::new(Code::Internal, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_are_those_of_the_kinds_on_the_wire() {
        for number in 0..17 {
            let kind = ErrorKind::from_code(number);
            assert_eq!(code(kind) as u32, kind.code());
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_is_told_once_from_the_outside_in() {
        assert_eq!(chain(&Outer(std::io::Error::other("inner"))), "outer: inner");
    }
}
