//! Landlock: rights that no later change of user or namespaces gives back.

use std::fmt;
use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};

use crate::JailError;

/// The newest ABI whose rights are asked for: file system, TCP, signals and abstract sockets, devices, logging.
const NEWEST: ABI = ABI::V7;

/// What Landlock does for the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Landlocked {
    /// The kernel enforces this version of its interface.
    Abi(i32),
    /// The kernel has none, for this reason.
    No(&'static str),
}

impl fmt::Display for Landlocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Abi(version) => write!(f, "Landlock ABI {version}"),
            Self::No(reason) => write!(f, "no Landlock ({reason})"),
        }
    }
}

/// Allows no path, no TCP port, and no signal or abstract socket to the outside, as far as the kernel knows how to
/// (landlock(7)); says how far that is. Descriptors that are open stay what they are.
pub fn allow_nothing() -> Result<Landlocked, JailError> {
    let doing = "restrict itself by Landlock";
    let failed = |error: landlock::RulesetError| JailError { doing, source: io::Error::other(error) };
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(failed)?;
    match status.landlock {
        LandlockStatus::NotEnabled => Ok(Landlocked::No("it is not in the kernel's lsm= list")),
        LandlockStatus::NotImplemented => Ok(Landlocked::No("the kernel is built without it")),
        LandlockStatus::Available { .. } if status.ruleset == RulesetStatus::NotEnforced => {
            Err(JailError { doing, source: io::Error::other("the kernel has it but does not enforce it") })
        }
        LandlockStatus::Available { effective_abi, kernel_abi } => {
            Ok(Landlocked::Abi(kernel_abi.unwrap_or(effective_abi as i32)))
        }
    }
}
