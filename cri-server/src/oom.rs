//! Kills for want of memory, as the kernel's log has them (Documentation/ABI/testing/dev-kmsg).
//!
//! A cgroup counts them itself, but systemd may have removed a scope with its last process before the daemon looks. The log is there
//! for longer.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::fs::OFlags;

use crate::vmm::VmIdentity;

const LOG: &str = "/dev/kmsg";
/// Longest record (PRINTK_MESSAGE_MAX in kernel/printk).
const MAX_RECORD: usize = 2048 + 256;
/// Records that are read at most. A log has room for fewer, but new ones may come all the time.
const MAX_RECORDS: usize = 1 << 17;
/// Ticks of [`VmIdentity::start_time`] in a second (USER_HZ of x86).
const TICKS: u64 = 100;

/// Whether the kernel's log says that it killed the VMM for want of memory. False if the log cannot be read, or no longer goes back
/// so far: nobody knows then.
pub fn killed(vmm: VmIdentity) -> bool {
    let opened = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(LOG);
    let Ok(mut log) = opened.inspect_err(|error| tracing::warn!(%error, "{LOG} cannot be read")) else { return false };
    let mut record = [0; MAX_RECORD];
    for _ in 0..MAX_RECORDS {
        match log.read(&mut record) {
            Ok(0) => return false,
            Ok(length) if victim(&record[..length]).is_some_and(|victim| victim.is(vmm)) => return true,
            Ok(_) => {}
            // Overwritten meanwhile, or longer than any: the next one.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::InvalidInput) => {}
            // There are no more.
            Err(_) => return false,
        }
    }
    false
}

/// A process that the kernel killed for want of memory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Victim {
    pid: i32,
    /// When, since the machine was started.
    at: Duration,
}

impl Victim {
    /// A process before it may have had the same id.
    fn is(&self, vmm: VmIdentity) -> bool {
        self.pid == vmm.pid && self.at >= Duration::from_millis(vmm.start_time.saturating_mul(1000 / TICKS))
    }
}

/// Whom a record of the log tells of: `PRIORITY,SEQUENCE,MICROSECONDS,FLAGS[,…];MESSAGE`.
pub(crate) fn victim(record: &[u8]) -> Option<Victim> {
    let (head, message) = std::str::from_utf8(record).ok()?.split_once(';')?;
    let mut head = head.split(',');
    let (priority, _sequence, micros) = (head.next()?, head.next()?, head.next()?);
    // Programs can write records as well, but none of the kernel's own facility, 0.
    if priority.parse::<u32>().ok()? >= 8 {
        return None;
    }
    let (what, process) = message.split_once("Killed process ")?;
    if !matches!(what, "Memory cgroup out of memory: " | "Out of memory: ") {
        return None;
    }
    let (pid, _) = process.split_once(' ')?;
    Some(Victim { pid: pid.parse().ok()?, at: Duration::from_micros(micros.parse().ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "3,1177,98765432,-;Memory cgroup out of memory: Killed process 4711 (isopod-vmm) total-vm:180000kB, \
                          anon-rss:16000kB, file-rss:900kB, shmem-rss:0kB, UID:1879048192 pgtables:120kB oom_score_adj:0\n";

    #[test]
    fn the_kernels_records_tell_whom_it_killed() {
        let expected = Victim { pid: 4711, at: Duration::from_micros(98_765_432) };
        assert_eq!(victim(RECORD.as_bytes()).as_ref(), Some(&expected));
        let of_the_machine = RECORD.replace("Memory cgroup out", "Out");
        assert_eq!(victim(of_the_machine.as_bytes()).as_ref(), Some(&expected));
        // 98.76 s are 9876 ticks.
        assert!(expected.is(VmIdentity { pid: 4711, start_time: 9876 }));
        assert!(!expected.is(VmIdentity { pid: 4711, start_time: 9877 }), "another one had this id before");
        assert!(!expected.is(VmIdentity { pid: 4712, start_time: 1 }));
    }

    #[test]
    fn what_others_write_and_what_else_is_said_tells_nothing() {
        let by_a_program = RECORD.replacen('3', "11", 1);
        let quoted = RECORD.replace("Memory", "he said: Memory");
        let reaped = "6,1,2,-;oom_reaper: reaped process 4711 (isopod-vmm), now anon-rss:0kB\n";
        for record in [
            &by_a_program,
            &quoted,
            reaped,
            "",
            ";",
            "3,1;Killed process 1 (x)",
            "3,1,x,-;Out of memory: Killed process 1 (x)",
        ] {
            assert_eq!(victim(record.as_bytes()), None, "{record}");
        }
        for length in 0..RECORD.len() {
            // Cut anywhere, it is another one or none, and no panic.
            let _ = victim(&RECORD.as_bytes()[..length]);
        }
        assert_eq!(victim(b"3,1,2,-;Out of memory: Killed process 1 (\xff)"), None);
    }
}
