//! How the process ends: one record for the daemon, and an exit status that says the same.

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};

pub use isopod_proto::chain;
use isopod_proto::encode_frame;
use isopod_proto::vmm::VmExit;
pub use isopod_proto::vmm::vm_exit::Reason;

/// Why the VM is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The kind of end.
    pub reason: Reason,
    /// What was tried, with what, and what failed.
    pub message: String,
}

impl Exit {
    /// An end for `reason`.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// An end because of `error`, with all its sources.
    pub fn from_error(reason: Reason, error: &dyn Error) -> Self {
        Self::new(reason, chain(error))
    }

    /// The process's exit status.
    pub fn status(&self) -> u8 {
        u8::try_from(self.reason as i32).expect("the reasons are small numbers")
    }

    /// Writes the record, with the end of the console, to the daemon's file.
    pub fn write_record(&self, mut to: &File, console: Vec<u8>) -> io::Result<()> {
        let record = VmExit { reason: self.reason.into(), message: self.message.clone(), console };
        to.write_all(&encode_frame(&record))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use isopod_proto::decode_frame;

    use super::*;

    #[test]
    fn the_record_is_read_back_and_the_status_is_its_reason() {
        let exit = Exit::new(Reason::GuestCrash, "triple fault");
        let mut file = tempfile::tempfile().expect("a temporary file");
        exit.write_record(&file, b"Oops".to_vec()).expect("room");
        file.rewind().expect("seekable");
        let mut bytes = vec![];
        file.read_to_end(&mut bytes).expect("readable");
        let (record, _) = decode_frame::<VmExit>(&bytes, 1024).expect("valid").expect("whole");
        assert_eq!((record.reason(), record.console), (Reason::GuestCrash, b"Oops".to_vec()));
        assert_eq!(exit.status(), 11);
    }
}
