//! The texts that the kernel gives its counters in. Total: what a text does not hold is absent.

use isopod_proto::agent::{InterfaceStats, Pressure, Stall};

/// Lines of "key number", such as memory.stat.
pub struct Keyed(String);

impl Keyed {
    /// Over the whole text of a file.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The number after `key`.
    pub fn number(&self, key: &str) -> Option<u64> {
        let mut pairs = self.0.lines().filter_map(|line| line.split_once(' '));
        pairs.find(|(found, _)| *found == key).and_then(|(_, value)| value.trim().parse().ok())
    }
}

/// A limit, as memory.max has it: a number, or "max", which is -1.
pub fn limit(text: &str) -> Option<i64> {
    match text.trim() {
        "max" => Some(-1),
        number => number.parse().ok().filter(|limit| *limit >= 0),
    }
}

/// cpu.max: the quota, as [`limit`], and the period.
pub fn cpu_max(text: &str) -> (Option<i64>, Option<u64>) {
    let (quota, period) = text.trim().split_once(' ').unwrap_or((text, ""));
    (limit(quota), period.parse().ok())
}

/// cpu.pressure and its like; None without a line of "some" (Documentation/accounting/psi.rst of the kernel).
pub fn pressure(text: &str) -> Option<Pressure> {
    let line = |kind: &str| text.lines().find_map(|line| stall(line.strip_prefix(kind)?));
    Some(Pressure { some: Some(line("some ")?), full: line("full ") })
}

/// "avg10=0.00 avg60=0.00 avg300=0.00 total=0"
fn stall(text: &str) -> Option<Stall> {
    let value = |name: &str| text.split_whitespace().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let percent = |name| value(name)?.parse::<f64>().ok().filter(|share| share.is_finite() && *share >= 0.0);
    Some(Stall {
        total_micros: value("total")?.parse().ok()?,
        avg10: percent("avg10")?,
        avg60: percent("avg60")?,
        avg300: percent("avg300")?,
    })
}

/// A line of io.stat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceLine {
    /// Which device.
    pub major: u32,
    /// As above.
    pub minor: u32,
    /// `rbytes`
    pub read_bytes: u64,
    /// `wbytes`
    pub written_bytes: u64,
    /// `rios`
    pub reads: u64,
    /// `wios`
    pub writes: u64,
}

/// io.stat: a line a device that the cgroup has used, "8:0 rbytes=1 wbytes=2 rios=3 wios=4 …".
pub fn device_lines(text: &str) -> Vec<DeviceLine> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut device = DeviceLine { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
        let mut found = 0;
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let field = match key {
                "rbytes" => &mut device.read_bytes,
                "wbytes" => &mut device.written_bytes,
                "rios" => &mut device.reads,
                "wios" => &mut device.writes,
                _ => continue,
            };
            *field = value.parse().ok()?;
            found += 1;
        }
        (found == 4).then_some(device)
    };
    text.lines().filter_map(line).collect()
}

/// The soft limit of "Max open files" in /proc/PID/limits; None if it is unlimited.
pub fn open_files_limit(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// DEVNAME of a device's uevent file.
pub fn device_name(uevent: &str) -> Option<&str> {
    uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))
}

/// The lines of /proc/net/dev after its two of heading: name, eight counters received, eight sent.
pub fn interfaces(text: &str) -> Vec<InterfaceStats> {
    let line = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_whitespace().map_while(|number| number.parse().ok()).collect();
        let at = |index: usize| counters.get(index).copied();
        Some(InterfaceStats {
            name: name.trim().into(),
            rx_bytes: at(0)?,
            rx_packets: at(1)?,
            rx_errors: at(2)?,
            rx_dropped: at(3)?,
            tx_bytes: at(8)?,
            tx_packets: at(9)?,
            tx_errors: at(10)?,
            tx_dropped: at(11)?,
        })
    };
    text.lines().skip(2).filter_map(line).filter(|interface| interface.name != "lo").collect()
}

/// A value of /proc/meminfo, in bytes.
pub fn meminfo(text: &str, wanted: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(name, _)| *name == wanted)?;
    value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn interface_counters_are_read_by_column() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
                    eth0: 100 2 3 4 5 6 7 8 900 10 11 12 13 14 15 16\nbroken: 1 2\nworse: 1 x 3 4 5 6 7 8 9 1 2 3\n";
        let expected = InterfaceStats {
            name: "eth0".into(),
            rx_bytes: 100,
            rx_packets: 2,
            rx_errors: 3,
            rx_dropped: 4,
            tx_bytes: 900,
            tx_packets: 10,
            tx_errors: 11,
            tx_dropped: 12,
        };
        assert_eq!(interfaces(text), [expected]);
    }

    #[test]
    fn a_key_is_a_whole_word() {
        let text = Keyed::new("anon 4096\nanon_thp 1\nfile -1\nempty\n".into());
        assert_eq!((text.number("anon"), text.number("anon_thp")), (Some(4096), Some(1)));
        assert_eq!((text.number("file"), text.number("empty"), text.number("an")), (None, None, None));
    }

    #[test]
    fn no_limit_is_not_the_same_as_an_unknown_one() {
        assert_eq!((limit("max\n"), limit("4096\n"), limit(""), limit("-5")), (Some(-1), Some(4096), None, None));
        assert_eq!(cpu_max("max 100000\n"), (Some(-1), Some(100_000)));
        assert_eq!(cpu_max("20000 100000\n"), (Some(20_000), Some(100_000)));
        assert_eq!(cpu_max(""), (None, None));
    }

    #[test]
    fn pressure_is_read_with_both_lines_or_one() {
        let some = "some avg10=0.50 avg60=1.00 avg300=0.00 total=17\n";
        let both = format!("{some}full avg10=0.00 avg60=0.00 avg300=0.00 total=5\n");
        let stall = Stall { total_micros: 17, avg10: 0.5, avg60: 1.0, avg300: 0.0 };
        assert_eq!(pressure(some), Some(Pressure { some: Some(stall), full: None }));
        assert_eq!(pressure(&both).unwrap().full.unwrap().total_micros, 5);
        assert_eq!(pressure("some avg10=0.50\n"), None);
        assert_eq!(pressure(""), None);
    }

    #[test]
    fn a_device_without_all_its_counters_is_left_out() {
        let text = "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n254:16 rbytes=1\n7:0\nnonsense\n";
        let device = DeviceLine { major: 254, minor: 0, read_bytes: 1, written_bytes: 2, reads: 3, writes: 4 };
        assert_eq!(device_lines(text), [device]);
    }

    #[test]
    fn what_proc_and_sys_say_is_found() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1048576              1048576              files     \n";
        assert_eq!(open_files_limit(limits), Some(1_048_576));
        assert_eq!(open_files_limit("Max open files            unlimited            unlimited            files"), None);
        assert_eq!(device_name("MAJOR=254\nMINOR=0\nDEVNAME=vda\nDEVTYPE=disk\n"), Some("vda"));
        let memory = "MemTotal:        1024 kB\nMemFree: 1 kB\nSwapTotal:   0 kB\n";
        assert_eq!((meminfo(memory, "MemTotal"), meminfo(memory, "SwapTotal")), (Some(1 << 20), Some(0)));
        assert_eq!(meminfo(memory, "MemAvailable"), None);
    }

    proptest! {
        /// A container names its network interfaces, so these lines are not all the kernel's own words.
        #[test]
        fn no_text_breaks_a_parser(text in "(some |full |[a-z0-9 :=.\n-]){0,200}|(?s).{0,200}") {
            let _ = (interfaces(&text), device_lines(&text), pressure(&text), cpu_max(&text));
            let _ = (limit(&text), open_files_limit(&text), meminfo(&text, "a"));
        }

        #[test]
        fn a_device_line_is_read_as_it_was_written(counters in proptest::array::uniform4(any::<u64>()), major in any::<u32>()) {
            let [read_bytes, written_bytes, reads, writes] = counters;
            let text = format!("{major}:1 rios={reads} rbytes={read_bytes} other=x wios={writes} wbytes={written_bytes}\n");
            let device = DeviceLine { major, minor: 1, read_bytes, written_bytes, reads, writes };
            prop_assert_eq!(device_lines(&text), [device]);
        }
    }
}
