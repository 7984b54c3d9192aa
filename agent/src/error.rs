//! The error of everything the agent does for the daemon.

use std::io;

use isopod_proto::ErrorKind;

/// What was tried, with its inputs, and why it failed. The daemon gets the kind and the text; see [`Error::chain`].
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Error {
    kind: ErrorKind,
    what: String,
    #[source]
    source: Option<io::Error>,
}

/// A result whose error is for the daemon.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error that no system call gave.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), source: None }
    }

    /// The request itself is wrong.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, what)
    }

    /// What was named does not exist.
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, what)
    }

    /// The object is in the wrong state.
    pub fn precondition(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::FailedPrecondition, what)
    }

    /// A system call failed while `what` was done.
    pub fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        Self { kind: kind_of(&source), what: what.into(), source: Some(source) }
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error as another kind, where the caller knows better what the failure means.
    #[must_use]
    pub fn with_kind(self, kind: ErrorKind) -> Self {
        Self { kind, ..self }
    }

    /// The same error, with what it was part of before its text.
    #[must_use]
    pub fn within(self, what: impl AsRef<str>) -> Self {
        Self { what: format!("{}: {}", what.as_ref(), self.what), ..self }
    }

    /// The whole text, causes included: what is printed once, at the edge.
    pub fn chain(&self) -> String {
        isopod_proto::chain(self)
    }
}

/// What an errno means where nothing more is known. Running out is the only cause a caller can act on.
fn kind_of(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ErrorKind::ResourceExhausted
        }
        io::ErrorKind::TimedOut => ErrorKind::DeadlineExceeded,
        _ => ErrorKind::Internal,
    }
}

/// `result.context(|| "what was done")`: an [`Error`] from a failed system call.
pub trait Context<T> {
    /// Says what was being done when the system call failed.
    fn context<W: Into<String>>(self, what: impl FnOnce() -> W) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<W: Into<String>>(self, what: impl FnOnce() -> W) -> Result<T> {
        self.map_err(|source| Error::io(what(), source))
    }
}
