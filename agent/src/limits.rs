//! Names of capabilities and resource limits, and their numbers.

use isopod_proto::agent::{Capabilities, Rlimit};
use rustix::process::Resource;

use crate::error::{Error, Result};
use crate::stub::message::{CapabilityBits, ResourceLimit};

/// Names as in capabilities(7), without "CAP_"; the index is the number.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Names as in getrlimit(2), without "RLIMIT_", and the number of x86-64 Linux.
const RESOURCES: [(&str, Resource); 16] = [
    ("CPU", Resource::Cpu),
    ("FSIZE", Resource::Fsize),
    ("DATA", Resource::Data),
    ("STACK", Resource::Stack),
    ("CORE", Resource::Core),
    ("RSS", Resource::Rss),
    ("NPROC", Resource::Nproc),
    ("NOFILE", Resource::Nofile),
    ("MEMLOCK", Resource::Memlock),
    ("AS", Resource::As),
    ("LOCKS", Resource::Locks),
    ("SIGPENDING", Resource::Sigpending),
    ("MSGQUEUE", Resource::Msgqueue),
    ("NICE", Resource::Nice),
    ("RTPRIO", Resource::Rtprio),
    ("RTTIME", Resource::Rttime),
];

/// The sets as bits. A name this crate does not know is an error that says it.
pub fn capability_bits(sets: &Capabilities) -> Result<CapabilityBits> {
    let Capabilities { bounding, effective, permitted, inheritable, ambient } = sets;
    let bits = |names: &[String]| names.iter().try_fold(0, |bits, name| Ok(bits | 1 << capability(name)?));
    Ok(CapabilityBits {
        bounding: bits(bounding)?,
        effective: bits(effective)?,
        permitted: bits(permitted)?,
        inheritable: bits(inheritable)?,
        ambient: bits(ambient)?,
    })
}

fn capability(name: &str) -> Result<usize> {
    let known = name.strip_prefix("CAP_").and_then(|short| CAPABILITIES.iter().position(|known| *known == short));
    known.ok_or_else(|| Error::invalid(format!("the capability {name:?} is not known")))
}

/// The limit with its resource as a number.
pub fn resource_limit(limit: &Rlimit) -> Result<ResourceLimit> {
    let Rlimit { name, soft, hard } = limit;
    let position =
        name.strip_prefix("RLIMIT_").and_then(|short| RESOURCES.iter().position(|(known, _)| *known == short));
    let position = position.ok_or_else(|| Error::invalid(format!("the resource limit {name:?} is not known")))?;
    if soft > hard {
        return Err(Error::invalid(format!("the soft limit {soft} of {name} is above its hard limit {hard}")));
    }
    let resource = u32::try_from(position).expect("the table is short");
    Ok(ResourceLimit { resource, soft: *soft, hard: *hard })
}

/// The resource of a number that [`resource_limit`] gave.
pub fn resource(number: u32) -> Option<Resource> {
    RESOURCES.get(number as usize).map(|(_, resource)| *resource)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_names_become_their_bits() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let sets = Capabilities { bounding: names(&["CAP_CHOWN", "CAP_SYS_ADMIN"]), ..Capabilities::default() };
        assert_eq!(capability_bits(&sets).unwrap().bounding, 1 | 1 << 21);
        for bad in ["CHOWN", "CAP_", "CAP_NO_SUCH", "cap_chown"] {
            let sets = Capabilities { ambient: names(&[bad]), ..Capabilities::default() };
            assert!(capability_bits(&sets).unwrap_err().chain().contains(bad));
        }
    }

    #[test]
    fn capability_numbers_are_the_kernels() {
        use rustix::thread::CapabilitySet;
        for (name, bit) in [
            ("CAP_SETPCAP", CapabilitySet::SETPCAP),
            ("CAP_MKNOD", CapabilitySet::MKNOD),
            ("CAP_CHECKPOINT_RESTORE", CapabilitySet::CHECKPOINT_RESTORE),
        ] {
            assert_eq!(1 << capability(name).unwrap(), bit.bits());
        }
    }

    #[test]
    fn limits_are_checked() {
        let limit = |name: &str, soft, hard| resource_limit(&Rlimit { name: name.into(), soft, hard });
        assert_eq!(resource(limit("RLIMIT_NOFILE", 1, 2).unwrap().resource), Some(Resource::Nofile));
        assert!(limit("RLIMIT_NOFILE", 3, 2).is_err());
        assert!(limit("NOFILE", 1, 2).is_err());
    }
}
