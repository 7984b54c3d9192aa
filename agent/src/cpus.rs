//! The guest's processors: which of those that there are run.

use std::fs;
use std::path::Path;

use crate::error::{Context as _, Error, Result};

/// Where the kernel shows the guest's processors.
pub const DIRECTORY: &str = "/sys/devices/system/cpu";

/// Brings up the first `count` processors below `directory` and takes the others down, in their order. The first one always runs.
pub fn set(directory: &Path, count: u32) -> Result<()> {
    let there = (0..).take_while(|number| directory.join(format!("cpu{number}")).is_dir()).count() as u32;
    if !(1..=there).contains(&count) {
        return Err(Error::invalid(format!("{count} processors are not between 1 and the {there} of this guest")));
    }
    for number in 1..there {
        let path = directory.join(format!("cpu{number}/online"));
        let wanted = if number < count { "1" } else { "0" };
        let state = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
        if state.trim() != wanted {
            fs::write(&path, wanted).context(|| format!("write {wanted} to {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use isopod_proto::ErrorKind;

    use super::*;

    /// A directory as sysfs has it: processor 0 cannot be taken down.
    fn processors(states: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("cpu0")).expect("made");
        for (number, state) in (1..).zip(states) {
            let cpu = directory.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).expect("made");
            fs::write(cpu.join("online"), format!("{state}\n")).expect("written");
        }
        directory
    }

    fn states(directory: &Path) -> Vec<String> {
        let read = |number| fs::read_to_string(directory.join(format!("cpu{number}/online"))).ok();
        (1..).map_while(read).map(|state| state.trim().to_owned()).collect()
    }

    #[test]
    fn the_first_ones_run_and_the_others_do_not() {
        let there = processors(&["1", "0", "0"]);
        for (count, wanted) in [(3, ["1", "1", "0"]), (4, ["1", "1", "1"]), (1, ["0", "0", "0"]), (1, ["0", "0", "0"])]
        {
            set(there.path(), count).expect("they are there");
            assert_eq!(states(there.path()), wanted);
        }
        for bad in [0, 5, u32::MAX] {
            let error = set(there.path(), bad).expect_err("there are four");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.chain().contains(&bad.to_string()), "{error}");
        }
        assert_eq!(states(there.path()), ["0", "0", "0"]);
    }

    #[test]
    fn a_processor_that_does_not_come_up_is_named() {
        let there = processors(&["0"]);
        fs::remove_file(there.path().join("cpu1/online")).expect("removed");
        let error = set(there.path(), 2).expect_err("it cannot be");
        assert!(error.chain().contains("cpu1/online"), "{}", error.chain());
    }
}
