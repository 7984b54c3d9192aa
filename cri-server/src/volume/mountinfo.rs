//! The host's list of mounts, /proc/PID/mountinfo (proc(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The file system's device, "major:minor".
    pub device: String,
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub place: PathBuf,
    /// It is shared, or a slave of one that is: what is mounted below it elsewhere shows.
    pub spreads: bool,
}

/// The mounts in `text`, the contents of the file. Of two at the same place the later one covers the other.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// This process's mounts.
pub fn read() -> std::io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mount that `path`, which has no symbolic links in it, is on.
pub fn mount_of<'m>(mounts: &'m [Mount], path: &Path) -> Option<&'m Mount> {
    // The last one of several that are equal.
    mounts.iter().filter(|mount| path.starts_with(&mount.place)).max_by_key(|mount| mount.place.as_os_str().len())
}

fn mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let (root, place) = (unescaped(fields.next()?), unescaped(fields.next()?));
    // After the mount's options, up to a dash.
    let mut optional = fields.skip(1).take_while(|field| *field != b"-");
    let spreads = optional.any(|field| field.starts_with(b"shared:") || field.starts_with(b"master:"));
    Some(Mount { device, root, place, spreads })
}

/// A path, in which space, tab, line feed and backslash are written as octal numbers.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, later)) = rest.split_first() {
        let number =
            later.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        let octal = number.map(|digits| digits.iter().fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0')));
        match octal.and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &later[3..];
            }
            None => {
                bytes.push(*first);
                rest = later;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        23 22 0:20 /sub /srv/a\\040b rw - tmpfs none rw\n\
        24 22 0:21 / /slave rw master:1 propagate_from:2 - tmpfs none rw\n\
        26 22 0:23 / /twice rw shared:3 - tmpfs none rw\n\
        27 22 0:24 / /twice rw - tmpfs shared:9 rw\n\
        rubbish\n\n";

    #[test]
    fn a_path_is_on_the_longest_mount_above_it_and_on_the_upper_of_two() {
        let mounts = parse(MOUNTS);
        let of = |path: &str| mount_of(&mounts, Path::new(path)).map(|mount| (mount.device.as_str(), mount.spreads));
        assert_eq!(of("/home/x"), Some(("8:1", true)));
        assert_eq!(of("/srv"), Some(("8:1", true)));
        assert_eq!(of("/srv/a b/c"), Some(("0:20", false)));
        assert_eq!(of("/slave"), Some(("0:21", true)));
        assert_eq!(of("/twice"), Some(("0:24", false)));
        // Not a component.
        assert_eq!(of("/slavery"), Some(("8:1", true)));
        assert_eq!(mounts[1].root, Path::new("/sub"));
    }

    #[test]
    fn only_octal_numbers_are_unescaped() {
        assert_eq!(unescaped(b"a\\134b\\011c"), PathBuf::from("a\\b\tc"));
        assert_eq!(unescaped(b"a\\9\\77"), PathBuf::from("a\\9\\77"));
        assert_eq!(unescaped(b"\\777"), PathBuf::from("\\777"));
    }
}
