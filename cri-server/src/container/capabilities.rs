//! The capabilities of a container's process (capabilities(7)).

use isopod_proto::agent::Capabilities;

use super::SpecError;
use crate::cri;

/// All of Linux 6.12, by number.
const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What a container has if its configuration says nothing: the set that other runtimes give, on which images rely.
const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SYS_CHROOT",
    "CAP_MKNOD",
    "CAP_AUDIT_WRITE",
    "CAP_SETFCAP",
];

/// The sets of a container with this configuration.
pub fn of(privileged: bool, wanted: &cri::Capability) -> Result<Capabilities, SpecError> {
    if privileged {
        return Ok(sets(|_| true, &[]));
    }
    let add = parse("linux.security_context.capabilities.add_capabilities", &wanted.add_capabilities)?;
    let drop = parse("linux.security_context.capabilities.drop_capabilities", &wanted.drop_capabilities)?;
    let ambient =
        parse("linux.security_context.capabilities.add_ambient_capabilities", &wanted.add_ambient_capabilities)?;
    if ambient.all {
        return Ok(sets(|_| true, &ALL));
    }
    let has = |name: &str| {
        // Singled out wins over "ALL", and dropped wins over added.
        if drop.names.contains(&name) {
            false
        } else if add.names.contains(&name) || ambient.names.contains(&name) {
            true
        } else if drop.all {
            false
        } else {
            add.all || DEFAULT.contains(&name)
        }
    };
    Ok(sets(has, &ambient.names))
}

struct Listed {
    all: bool,
    names: Vec<&'static str>,
}

fn parse(field: &'static str, names: &[String]) -> Result<Listed, SpecError> {
    let mut listed = Listed { all: false, names: Vec::new() };
    for name in names {
        let upper = name.to_ascii_uppercase();
        if upper == "ALL" {
            listed.all = true;
            continue;
        }
        let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let known = ALL.iter().find(|known| known.strip_prefix("CAP_") == Some(plain));
        let shown: String = name.chars().take(80).collect();
        listed.names.push(
            known.ok_or_else(|| SpecError::Invalid { field, problem: format!("{shown:?} is not a capability") })?,
        );
    }
    Ok(listed)
}

fn sets(has: impl Fn(&str) -> bool, ambient: &[&str]) -> Capabilities {
    let of = |has: &dyn Fn(&str) -> bool| ALL.into_iter().filter(|name| has(name)).map(str::to_owned).collect();
    // Only what is ambient is inheritable: anything more would let a program's file capabilities widen what it has.
    let ambient = |name: &str| ambient.contains(&name) && has(name);
    Capabilities {
        bounding: of(&has),
        effective: of(&has),
        permitted: of(&has),
        inheritable: of(&ambient),
        ambient: of(&ambient),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(add: &[&str], drop: &[&str], ambient: &[&str]) -> cri::Capability {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        cri::Capability {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            add_ambient_capabilities: owned(ambient),
        }
    }

    #[test]
    fn all_can_be_added_and_dropped_with_exceptions() {
        let only = of(false, &wanted(&["NET_ADMIN"], &["ALL"], &[])).expect("valid");
        assert_eq!(only.permitted, ["CAP_NET_ADMIN"]);
        let without = of(false, &wanted(&["ALL"], &["CAP_SYS_ADMIN"], &[])).expect("valid");
        assert_eq!(without.permitted.len(), ALL.len() - 1);
        assert!(!without.bounding.contains(&"CAP_SYS_ADMIN".to_owned()));
    }

    #[test]
    fn the_default_set_has_nothing_inheritable() {
        let default = of(false, &cri::Capability::default()).expect("valid");
        assert_eq!(default.effective.len(), DEFAULT.len());
        assert!(default.inheritable.is_empty() && default.ambient.is_empty());
    }

    #[test]
    fn an_ambient_capability_is_in_every_set() {
        let sets = of(false, &wanted(&[], &[], &["sys_time"])).expect("valid");
        let name = "CAP_SYS_TIME".to_owned();
        for set in [&sets.bounding, &sets.effective, &sets.permitted, &sets.inheritable, &sets.ambient] {
            assert!(set.contains(&name));
        }
    }

    #[test]
    fn a_privileged_container_has_them_all() {
        assert_eq!(of(true, &wanted(&[], &["ALL"], &[])).expect("valid").bounding.len(), ALL.len());
    }

    #[test]
    fn a_capability_that_does_not_exist_is_named() {
        let error = of(false, &wanted(&["CAP_FLY"], &[], &[])).expect_err("no such thing");
        assert!(error.to_string().contains("CAP_FLY"), "{error}");
    }
}
