//! The seccomp filter of a container's processes.
//!
//! A profile is [`profile`] (an OCI seccomp JSON file of the node, or [`default`]); [`compile`] makes of it the classic BPF
//! program that the agent loads. The guest never sees a profile.

mod bpf;
pub(crate) mod compile;
mod default;
pub(crate) mod profile;
mod table;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;

use isopod_proto::agent::Capabilities;
use rustix::fs::{FileType, Mode, OFlags};

use self::profile::{Profile, ProfileError};
use super::SpecError;
use crate::cri;
use crate::cri::security_profile::ProfileType;

/// The field that asks for a profile, as errors name it.
const FIELD: &str = "config.linux.security_context.seccomp";
/// The older field that asks for one.
const PATH_FIELD: &str = "config.linux.security_context.seccomp_profile_path";
/// Most bytes of a profile; a large one has 20 KiB, and Kubernetes keeps none above 1 MiB.
const MAX_FILE: u64 = 1024 * 1024;

/// A filter that is ready to be loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// An array of `struct sock_filter`; empty: no filter.
    pub program: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_ bits of seccomp(2).
    pub flags: u32,
}

/// Where a profile comes from.
#[derive(Debug, PartialEq, Eq)]
enum Choice<'a> {
    Unconfined,
    Default,
    File(&'a str),
}

/// The filter that a container with this context and these capabilities is to have. Reads the file of a Localhost profile, so
/// it may block.
///
/// # Errors
/// `Invalid` for a profile that is not there, is no profile or does not fit into a filter, by its path.
pub fn filter(context: &cri::LinuxContainerSecurityContext, capabilities: &Capabilities) -> Result<Filter, SpecError> {
    let granted = |name: &str| capabilities.bounding.iter().any(|granted| granted == name);
    let (profile, named) = match choose(context)? {
        Choice::Unconfined => return Ok(Filter::default()),
        Choice::Default => (default::profile(&granted), "RuntimeDefault"),
        Choice::File(path) => (read(path, &granted)?, path),
    };
    let program = compile::compile(&profile).map_err(|error| invalid(FIELD, named, &error))?;
    Ok(Filter { program: bpf::encode(&program), flags: profile.flags })
}

fn invalid(field: &'static str, path: &str, error: &dyn std::fmt::Display) -> SpecError {
    let shown: String = path.chars().take(200).collect();
    SpecError::Invalid { field, problem: format!("the profile {shown:?}: {error}") }
}

/// Which profile is asked for. None is unconfined, and so is a privileged container whatever it asks for.
fn choose(context: &cri::LinuxContainerSecurityContext) -> Result<Choice<'_>, SpecError> {
    if context.privileged {
        return Ok(Choice::Unconfined);
    }
    if let Some(profile) = &context.seccomp {
        let path = profile.localhost_ref.as_str();
        let choice = match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::Localhost) => return Ok(Choice::File(path)),
            Ok(ProfileType::RuntimeDefault) => Choice::Default,
            Ok(ProfileType::Unconfined) => Choice::Unconfined,
            Err(_) => return Err(invalid(FIELD, path, &format!("{} is not a type", profile.profile_type))),
        };
        let alone = path.is_empty();
        return if alone {
            Ok(choice)
        } else {
            Err(invalid(FIELD, path, &"it is given, but the type is not Localhost"))
        };
    }
    #[expect(deprecated, reason = "clients may still set the old field, and it must not be ignored")]
    let old = context.seccomp_profile_path.as_str();
    match old {
        "" | "unconfined" => Ok(Choice::Unconfined),
        "runtime/default" | "docker/default" => Ok(Choice::Default),
        _ => match old.strip_prefix("localhost/") {
            Some(path) => Ok(Choice::File(path)),
            None => Err(invalid(PATH_FIELD, old, &"it is not runtime/default, unconfined or localhost/PATH")),
        },
    }
}

/// The profile in a file of the node. Anybody may have written it, and anything may be at its place.
fn read(path: &str, granted: &dyn Fn(&str) -> bool) -> Result<Profile, SpecError> {
    let failed = |error: &dyn std::fmt::Display| invalid(FIELD, path, error);
    if !path.starts_with('/') || path.contains('\0') {
        return Err(failed(&"it is not an absolute path"));
    }
    // O_NONBLOCK: a FIFO must not make the daemon wait.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(&error))?;
    let status = rustix::fs::fstat(&file).map_err(|error| failed(&error))?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Err(failed(&"it is not a regular file"));
    }
    let mut bytes = Vec::new();
    File::from(file).take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|error| failed(&error))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(failed(&ProfileError::TooLarge));
    }
    profile::parse(&bytes, granted).map_err(|error| failed(&error))
}
