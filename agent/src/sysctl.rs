//! Sysctls of the pod.

use std::io::Write as _;
use std::os::fd::AsFd;

use isopod_proto::ErrorKind;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use crate::error::{Context as _, Error, Result};

/// Most bytes of a name; the longest real ones have some sixty.
const MAX_NAME: usize = 256;

/// The path below /proc/sys of a sysctl's name in either of sysctl(8)'s forms: "net.ipv4.ip_forward", or with slashes.
pub(crate) fn path_of(name: &str) -> Result<String> {
    let refused = || Error::invalid(format!("the sysctl name {name:?} is not valid"));
    let path: String = match name.find(['.', '/']) {
        // In the dot form a slash stands for a dot in a component, such as in the name of an interface.
        Some(first) if name[first..].starts_with('.') => name
            .chars()
            .map(|letter| match letter {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:@".contains(&byte);
    let valid = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(allowed);
    if name.len() <= MAX_NAME && path.split('/').all(valid) { Ok(path) } else { Err(refused()) }
}

/// Sets the sysctl `name` to `value`.
pub fn set(name: &str, value: &str) -> Result<()> {
    let path = path_of(name)?;
    let text = || format!("set the sysctl {name:?} to {value:?}");
    let refused = |error: Error| error.with_kind(ErrorKind::InvalidArgument);
    let root = rustix::fs::openat(CWD, "/proc/sys", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).context(text)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = rustix::fs::openat2(root.as_fd(), &path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), resolve)
        .context(text)
        .map_err(refused)?;
    std::fs::File::from(file).write_all(value.as_bytes()).context(text).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_give_the_path() {
        assert_eq!(path_of("net.ipv4.ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(path_of("kernel/shm_rmid_forced").unwrap(), "kernel/shm_rmid_forced");
        assert_eq!(path_of("net.ipv4.conf.eth0/1.mtu").unwrap(), "net/ipv4/conf/eth0.1/mtu");
        assert_eq!(path_of("net/ipv4/conf/eth0.1/mtu").unwrap(), "net/ipv4/conf/eth0.1/mtu");
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for bad in ["", ".", "..", "a..b", "/etc/passwd", "net//x", "net/../../x", "a.//.b", "a b", "x\0y"] {
            let error = path_of(bad).unwrap_err();
            assert!(error.chain().contains(&format!("{bad:?}")), "{}", error.chain());
        }
        assert!(path_of(&"a".repeat(257)).is_err());
    }
}
