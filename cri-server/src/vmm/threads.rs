//! What a VMM's threads do, for the log when its guest does not answer.

use std::fs;
use std::path::Path;

use super::stat::field;

/// Most threads that are looked at.
const LIMIT: usize = 96;
/// Most characters shown of what a file of /proc has.
const WIDTH: usize = 32;

/// For each thread of process `pid` its name, state, clock ticks of CPU time in user and kernel mode, and where in the kernel
/// it waits (proc(5)): "vcpu0 S 12+34 kvm_vcpu_block". A guest that runs has a vCPU in state R whose ticks grow; one that waits
/// for an interrupt has one in `kvm_vcpu_block`. Empty if the process is gone.
pub fn threads(pid: i32) -> String {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return String::new() };
    let lines: Vec<String> = tasks.flatten().take(LIMIT).filter_map(|task| line(&task.path())).collect();
    lines.join(", ")
}

fn line(task: &Path) -> Option<String> {
    let read = |name: &str| fs::read_to_string(task.join(name)).ok();
    let stat = read("stat")?;
    let (state, user, system) = (field(&stat, 3)?, field(&stat, 14)?, field(&stat, 15)?);
    let name = shown(&read("comm")?);
    let wait = shown(&read("wchan").unwrap_or_default());
    Some(format!("{name} {state} {user}+{system} {wait}"))
}

/// A process names its own threads.
fn shown(text: &str) -> String {
    text.trim_end().chars().filter(|character| character.is_ascii_graphic()).take(WIDTH).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_thread_is_shown_by_its_name() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let waits = move || receiver.recv().is_err();
        let thread = std::thread::Builder::new().name("a b) vcpu7".into()).spawn(waits).expect("a thread");
        let own = std::process::id() as i32;
        let found = (0..500).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            threads(own).split(", ").find(|line| line.starts_with("ab)vcpu7 S ")).map(str::to_owned)
        });
        drop(sender);
        assert!(thread.join().expect("joined"));
        assert!(found.is_some(), "{}", threads(own));
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        assert_eq!(threads(i32::MAX), "");
    }
}
