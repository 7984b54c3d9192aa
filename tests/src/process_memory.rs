//! What a VMM process costs beside the guest's memory.

use anyhow::{Context, Result};

/// Private bytes (clean and dirty) of a process, without the mappings that are the guest's memory: those at least a quarter of
/// `guest_bytes` large (a VMM may split the guest's memory, and maps nothing else of that size).
///
/// Source: `smaps` in Linux' Documentation/filesystems/proc.rst.
pub fn private_bytes_outside_guest(pid: u32, guest_bytes: u64) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(private_kib(&text, guest_bytes / 1024) * 1024)
}

fn private_kib(smaps: &str, guest_kib: u64) -> u64 {
    let mut total = 0;
    let mut size = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let Ok(kib) = value.parse::<u64>() else { continue };
        match key {
            "Size:" => size = kib,
            "Private_Clean:" | "Private_Dirty:" if size < guest_kib / 4 => total += kib,
            _ => {}
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "\
00400000-00500000 r-xp 00000000 00:00 1 /x\nSize: 1024 kB\nPrivate_Clean: 8 kB\nPrivate_Dirty: 4 kB\n\
7f0000000000-7f0008000000 rw-p 00000000 00:00 0\nSize: 131072 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 9999 kB\n";
        assert_eq!(private_kib(smaps, 131072), 12);
    }
}
