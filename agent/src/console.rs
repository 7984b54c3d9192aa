//! The agent's few words in the kernel's log, which the console shows. There is nobody else to tell.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};

/// Most messages the agent writes in its life: a guest must not flood its console, and nothing here happens often.
const MAX_MESSAGES: u32 = 64;

static WRITTEN: AtomicU32 = AtomicU32::new(0);

/// Writes `text` to the kernel's log.
pub fn say(text: &str) {
    if WRITTEN.fetch_add(1, Ordering::Relaxed) >= MAX_MESSAGES {
        return;
    }
    // <3> is the level "error", which the console shows also with "quiet". If there is no log, there is nobody to tell.
    let line = format!("<3>isopod-agent: {text}\n");
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = log.write_all(line.as_bytes());
    } else if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(&line.as_bytes()[3..]);
    }
}
