//! Landlock: rights that no later change of user or namespaces gives back.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
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
    match restrict(CompatLevel::BestEffort, Ok)? {
        Some(landlocked) => Ok(landlocked),
        None => Err(failed(io::Error::other("the kernel has it but does not enforce it"))),
    }
}

/// The same, but for files below `root` and in what is mounted there, now or later: those can be read, written, made, removed and
/// moved, not executed; device nodes can neither be made nor used. A file that the host moves out of there is out of reach.
///
/// Not on a kernel with the first version of Landlock (before 5.19), which forbids to move a file to another directory.
pub fn allow_below(root: BorrowedFd) -> Result<Landlocked, JailError> {
    let rights = AccessFs::from_all(NEWEST)
        & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let landlocked = restrict(CompatLevel::SoftRequirement, |ruleset| {
        ruleset.set_compatibility(CompatLevel::BestEffort).add_rule(PathBeneath::new(root, rights))
    })?;
    Ok(landlocked.unwrap_or(Landlocked::No("the kernel's is too old to allow a move between directories")))
}

fn failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> JailError {
    JailError { doing: "restrict itself by Landlock", source: io::Error::other(source) }
}

/// Restricts the process to what the rules that `allow` adds say; none if that is `NotEnforced`, which `moving`, how much it matters that
/// the kernel knows of moves between directories, can make it.
fn restrict(
    moving: CompatLevel,
    allow: impl FnOnce(RulesetCreated) -> Result<RulesetCreated, RulesetError>,
) -> Result<Option<Landlocked>, JailError> {
    let status = Ruleset::default()
        .set_compatibility(moving)
        .handle_access(AccessFs::Refer)
        .map(|ruleset| ruleset.set_compatibility(CompatLevel::BestEffort))
        .and_then(|ruleset| ruleset.handle_access(AccessFs::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .and_then(allow)
        .and_then(RulesetCreated::restrict_self)
        .map_err(failed)?;
    Ok(match status.landlock {
        LandlockStatus::NotEnabled => Some(Landlocked::No("it is not in the kernel's lsm= list")),
        LandlockStatus::NotImplemented => Some(Landlocked::No("the kernel is built without it")),
        LandlockStatus::Available { .. } if status.ruleset == RulesetStatus::NotEnforced => None,
        LandlockStatus::Available { effective_abi, kernel_abi } => {
            Some(Landlocked::Abi(kernel_abi.unwrap_or(effective_abi as i32)))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::ErrorKind;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn below_the_root_files_can_be_made_and_moved_and_elsewhere_nothing() {
        let (root, outside) = (tempfile::tempdir().expect("made"), tempfile::NamedTempFile::new().expect("made"));
        let below = root.path().to_owned();
        // Of a thread, which ends with the test.
        let confined = std::thread::spawn(move || {
            let landlocked = allow_below(File::open(&below).expect("open").as_fd()).expect("the kernel does");
            if let Landlocked::No(_) = landlocked {
                println!("skipped: {landlocked}");
                return;
            }
            fs::create_dir(below.join("from")).expect("made");
            fs::create_dir(below.join("to")).expect("made");
            fs::write(below.join("from/file"), "text").expect("written");
            fs::rename(below.join("from/file"), below.join("to/file")).expect("moved");
            assert_eq!(fs::read(below.join("to/file")).expect("read"), b"text");
            fs::remove_dir(below.join("from")).expect("removed");
            let denied = |result: io::Result<()>| result.expect_err("denied").kind() == ErrorKind::PermissionDenied;
            assert!(denied(fs::read(outside.path()).map(drop)));
            assert!(denied(fs::remove_file(outside.path())));
            assert!(denied(File::create(outside.path().with_extension("new")).map(drop)));
            assert!(denied(fs::read_dir("/").map(drop)));
        });
        confined.join().expect("as it must be");
    }
}
