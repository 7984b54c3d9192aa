//! How many descriptors a container's processes have open.

use std::fs;
use std::path::Path;

/// Most descriptors that are looked at; a container with more has no count, as counting would cost the guest too much.
const MAX_DESCRIPTORS: u64 = 65_536;

/// Descriptors, and how many of them are sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptors {
    /// All.
    pub all: u64,
    /// Those that /proc shows as `socket:[…]`.
    pub sockets: u64,
}

/// The open descriptors of `processes`. What ends meanwhile does not count.
pub fn count(processes: &[i32]) -> Option<Descriptors> {
    let mut found = Descriptors::default();
    for process in processes {
        let Ok(entries) = fs::read_dir(Path::new("/proc").join(process.to_string()).join("fd")) else { continue };
        for entry in entries.flatten() {
            found.all += 1;
            if found.all > MAX_DESCRIPTORS {
                return None;
            }
            let target = fs::read_link(entry.path()).unwrap_or_default();
            found.sockets += u64::from(target.to_string_lossy().starts_with("socket:"));
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_counted_as_one() {
        let own = || count(&[i32::try_from(std::process::id()).unwrap()]).unwrap();
        let before = own();
        let sockets: Vec<_> = (0..20).map(|_| std::os::unix::net::UnixStream::pair().unwrap()).collect();
        let after = own();
        // Other tests of this process open and close some as well.
        assert!(after.sockets >= before.sockets + 30 && after.all >= after.sockets, "{before:?} {after:?}");
        drop(sockets);
        assert_eq!(count(&[]), Some(Descriptors::default()));
        assert_eq!(count(&[i32::MAX]), Some(Descriptors::default()));
    }
}
