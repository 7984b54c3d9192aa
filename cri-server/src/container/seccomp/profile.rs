//! Seccomp profiles: what is done with which system call, and their form in a file (OCI runtime specification, config-linux,
//! "Seccomp"; with `archMap`, `includes` and `excludes`, which the profiles of Docker and CRI-O use besides).

use serde::Deserialize;

use super::table;

/// Most alternatives for one system call that a rule may give; six arguments have six.
const MAX_ARGUMENTS: usize = 32;
/// The largest number that a system call can fail with (MAX_ERRNO in Linux).
const MAX_ERRNO: u32 = 4095;
const EPERM: u16 = 1;
/// Version of the guest's kernel, for rules that ask for a least one.
const GUEST_KERNEL: (u32, u32) = (6, 12);

/// A checked profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// What is done with what no rule is for.
    pub default: Action,
    /// Whether it is for 32-bit programs too; if not, their first system call ends them.
    pub x86: bool,
    /// SECCOMP_FILTER_FLAG_ bits.
    pub flags: u32,
    /// What is done with what.
    pub rules: Vec<Rule>,
}

/// What is done with some system calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Their names; those that no architecture of the guest has do not matter.
    pub names: Vec<String>,
    /// What is done.
    pub action: Action,
    /// Only if these hold of the arguments: all of them, or, if an argument is named twice, any of them.
    pub conditions: Vec<Condition>,
}

/// What is done with a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The process ends by SIGSYS.
    KillProcess,
    /// The thread does.
    KillThread,
    /// The thread gets SIGSYS.
    Trap,
    /// It fails with this number.
    Errno(u16),
    /// The tracer decides, and is told this number.
    Trace(u16),
    /// It is done and logged.
    Log,
    /// It is done.
    Allow,
}

impl Action {
    /// The value that a filter returns for it (SECCOMP_RET_ in linux/seccomp.h).
    pub fn value(self) -> u32 {
        match self {
            Self::KillProcess => 0x8000_0000,
            Self::KillThread => 0,
            Self::Trap => 0x0003_0000,
            Self::Errno(number) => 0x0005_0000 | u32::from(number),
            Self::Trace(number) => 0x7ff0_0000 | u32::from(number),
            Self::Log => 0x7ffc_0000,
            Self::Allow => 0x7fff_0000,
        }
    }

    /// Whether the system call is done.
    pub fn permits(self) -> bool {
        matches!(self, Self::Log | Self::Allow)
    }
}

/// A condition on one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which: 0 to 5.
    pub index: u8,
    /// What must hold.
    pub operator: Operator,
}

/// How the argument is compared: unsigned, 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// `!=`
    NotEqual(u64),
    /// `<`
    Less(u64),
    /// `<=`
    LessOrEqual(u64),
    /// `==`
    Equal(u64),
    /// `>=`
    GreaterOrEqual(u64),
    /// `>`
    Greater(u64),
    /// `argument & mask == value & mask`
    MaskedEqual {
        /// Which bits count.
        mask: u64,
        /// What they are.
        value: u64,
    },
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Its text.
    #[error("it is not a seccomp profile: {0}")]
    Json(serde_json::Error),
    /// A name of a system call that is refused, but does not exist.
    #[error("there is no system call {0:?}")]
    UnknownCall(String),
    /// Something that isopod does not do.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// A value.
    #[error("{0}")]
    Invalid(String),
    /// More than fits.
    #[error("it is too large")]
    TooLarge,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawProfile {
    default_action: RawAction,
    default_errno_ret: Option<u32>,
    default_errno: Option<String>,
    architectures: Option<Vec<String>>,
    arch_map: Option<Vec<RawArchitectures>>,
    flags: Option<Vec<String>>,
    listener_path: Option<String>,
    listener_metadata: Option<String>,
    syscalls: Option<Vec<RawRule>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawArchitectures {
    architecture: String,
    sub_architectures: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRule {
    name: Option<String>,
    names: Option<Vec<String>>,
    action: RawAction,
    errno_ret: Option<u32>,
    errno: Option<String>,
    args: Option<Vec<RawCondition>>,
    #[serde(rename = "comment")]
    _comment: Option<String>,
    includes: Option<RawFilter>,
    excludes: Option<RawFilter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawFilter {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawCondition {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: RawOperator,
}

#[derive(Clone, Copy, Deserialize)]
enum RawAction {
    #[serde(rename = "SCMP_ACT_KILL", alias = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    #[serde(rename = "SCMP_ACT_NOTIFY")]
    Notify,
}

#[derive(Clone, Copy, Deserialize)]
enum RawOperator {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    LessOrEqual,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    GreaterOrEqual,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}

/// Reads the text of a profile. `granted` tells which capabilities ("CAP_…") the container has.
pub fn parse(text: &[u8], granted: &dyn Fn(&str) -> bool) -> Result<Profile, ProfileError> {
    let raw: RawProfile = serde_json::from_slice(text).map_err(ProfileError::Json)?;
    let RawProfile { default_action, default_errno_ret, default_errno, listener_path, listener_metadata, .. } = &raw;
    if listener_path.is_some() || listener_metadata.is_some() {
        return Err(ProfileError::Unsupported("a listener of notifications (listenerPath)".to_owned()));
    }
    let default = action(*default_action, *default_errno_ret, default_errno.as_deref())?;
    let x86 = architectures(&raw)?;
    let flags = raw.flags.iter().flatten().try_fold(0, |flags, name| Ok(flags | flag(name)?))?;
    let mut rules = Vec::new();
    for raw in raw.syscalls.into_iter().flatten() {
        rules.extend(rule(raw, granted)?);
    }
    Ok(Profile { default, x86, flags, rules })
}

/// What a rule does. An error number is given for those that have one only (OCI: otherwise the runtime MUST fail).
fn action(raw: RawAction, number: Option<u32>, name: Option<&str>) -> Result<Action, ProfileError> {
    if let (Some(name), None) = (name, number) {
        return Err(ProfileError::Unsupported(format!("an error by its name alone ({:?})", shown(name))));
    }
    let errno = || match number {
        None => Ok(EPERM),
        Some(number @ 0..=MAX_ERRNO) => Ok(u16::try_from(number).expect("it is at most 4095")),
        Some(number) => Err(ProfileError::Invalid(format!("{number} is not the number of an error"))),
    };
    let action = match raw {
        RawAction::Errno => return Ok(Action::Errno(errno()?)),
        RawAction::Trace => return Ok(Action::Trace(errno()?)),
        RawAction::Notify => return Err(ProfileError::Unsupported("SCMP_ACT_NOTIFY".to_owned())),
        RawAction::KillThread => Action::KillThread,
        RawAction::KillProcess => Action::KillProcess,
        RawAction::Trap => Action::Trap,
        RawAction::Allow => Action::Allow,
        RawAction::Log => Action::Log,
    };
    match number {
        None => Ok(action),
        Some(number) => Err(ProfileError::Invalid(format!("the error number {number} belongs to no such action"))),
    }
}

/// Whether 32-bit programs are meant. x86-64 always is: it is what a guest runs.
fn architectures(raw: &RawProfile) -> Result<bool, ProfileError> {
    let own = |map: &&RawArchitectures| map.architecture == "SCMP_ARCH_X86_64";
    let mapped = raw.arch_map.iter().flatten().filter(own).flat_map(|map| map.sub_architectures.iter().flatten());
    let mut x86 = false;
    for name in raw.architectures.iter().flatten().chain(mapped) {
        match name.strip_prefix("SCMP_ARCH_") {
            Some("X86") => x86 = true,
            // The guest's kernel has no x32 system calls, and no other processor's.
            Some(other)
                if !other.is_empty() && other.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') => {}
            _ => return Err(ProfileError::Invalid(format!("{:?} is not an architecture", shown(name)))),
        }
    }
    Ok(x86)
}

/// The bit of a flag. A container's process has one thread when the filter is loaded, so that TSYNC asks for nothing.
fn flag(name: &str) -> Result<u32, ProfileError> {
    match name {
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(0),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(1 << 1),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(1 << 2),
        _ => Err(ProfileError::Unsupported(format!("the flag {:?}", shown(name)))),
    }
}

/// The rule, unless it is for containers with other capabilities or for another system.
fn rule(raw: RawRule, granted: &dyn Fn(&str) -> bool) -> Result<Option<Rule>, ProfileError> {
    let RawRule { name, names, action: raw_action, errno_ret, errno, args, _comment, includes, excludes } = raw;
    let action = action(raw_action, errno_ret, errno.as_deref())?;
    let args = args.unwrap_or_default();
    if args.len() > MAX_ARGUMENTS {
        return Err(ProfileError::TooLarge);
    }
    let conditions = args.iter().map(condition).collect::<Result<_, _>>()?;
    let names: Vec<String> = names.into_iter().flatten().chain(name).collect();
    if names.is_empty() {
        return Err(ProfileError::Invalid("a rule names no system call".to_owned()));
    }
    // A name that nobody knows is not allowed by being ignored; but one that is misspelt would not be refused either.
    if !action.permits()
        && let Some(unknown) = names.iter().find(|name| !table::exists(name))
    {
        return Err(ProfileError::UnknownCall(shown(unknown)));
    }
    let wanted = match &includes {
        Some(RawFilter { caps, arches, min_kernel }) => {
            let arch = arches.as_ref().is_none_or(|arches| arches.is_empty() || arches.iter().any(|arch| is_own(arch)));
            caps.iter().flatten().all(|cap| granted(cap)) && arch && new_enough(min_kernel.as_deref())?.unwrap_or(true)
        }
        None => true,
    };
    let unwanted = match &excludes {
        Some(RawFilter { caps, arches, min_kernel }) => {
            let arch = arches.iter().flatten().any(|arch| is_own(arch));
            caps.iter().flatten().any(|cap| granted(cap)) || arch || new_enough(min_kernel.as_deref())?.unwrap_or(false)
        }
        None => false,
    };
    Ok((wanted && !unwanted).then_some(Rule { names, action, conditions }))
}

fn is_own(architecture: &str) -> bool {
    matches!(architecture, "amd64" | "x86_64" | "SCMP_ARCH_X86_64")
}

/// Whether the guest's kernel is at least this one, such as "4.8"; none if none is asked for.
fn new_enough(least: Option<&str>) -> Result<Option<bool>, ProfileError> {
    let Some(least) = least.filter(|least| !least.is_empty()) else { return Ok(None) };
    let version = least.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let version: (u32, u32) =
        version.ok_or_else(|| ProfileError::Invalid(format!("{:?} is not a kernel version", shown(least))))?;
    Ok(Some(GUEST_KERNEL >= version))
}

fn condition(raw: &RawCondition) -> Result<Condition, ProfileError> {
    let RawCondition { index, value, value_two, op } = *raw;
    let operator = match op {
        RawOperator::NotEqual => Operator::NotEqual(value),
        RawOperator::Less => Operator::Less(value),
        RawOperator::LessOrEqual => Operator::LessOrEqual(value),
        RawOperator::Equal => Operator::Equal(value),
        RawOperator::GreaterOrEqual => Operator::GreaterOrEqual(value),
        RawOperator::Greater => Operator::Greater(value),
        RawOperator::MaskedEqual => Operator::MaskedEqual { mask: value, value: value_two },
    };
    match index {
        0..=5 => Ok(Condition { index: u8::try_from(index).expect("it is at most 5"), operator }),
        _ => Err(ProfileError::Invalid(format!("a system call has no argument {index}"))),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}
