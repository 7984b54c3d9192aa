//! How much CPU time something takes at the moment.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Shortest time a rate is taken over: a shorter one says more about the question than about what was asked.
const LEAST: Duration = Duration::from_secs(1);

/// The CPU time of one cgroup, as often as it is asked for.
#[derive(Debug, Default)]
pub struct CpuRate {
    seen: Mutex<Option<Seen>>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    at: Instant,
    micros: u64,
    nano_cores: Option<u64>,
}

impl CpuRate {
    /// Nanoseconds of CPU time a second since an earlier call; None at the first, and until a second has passed.
    pub fn observe(&self, micros: u64, now: Instant) -> Option<u64> {
        let mut seen = self.seen.lock();
        let Some(last) = *seen else {
            *seen = Some(Seen { at: now, micros, nano_cores: None });
            return None;
        };
        let elapsed = now.saturating_duration_since(last.at);
        if elapsed < LEAST {
            return last.nano_cores;
        }
        let used = u128::from(micros.saturating_sub(last.micros)) * 1000 * 1_000_000_000;
        let nano_cores = u64::try_from(used / elapsed.as_nanos()).ok();
        *seen = Some(Seen { at: now, micros, nano_cores });
        nano_cores
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_looks_a_second_apart() {
        let (rate, start) = (CpuRate::default(), Instant::now());
        let after = |millis| start + Duration::from_millis(millis);
        assert_eq!(rate.observe(100, start), None);
        assert_eq!(rate.observe(200, after(500)), None);
        assert_eq!(rate.observe(500_100, after(2000)), Some(250_000_000));
        // The last rate stands until there is a better one.
        assert_eq!(rate.observe(900_000, after(2100)), Some(250_000_000));
        assert_eq!(rate.observe(500_100, after(4000)), Some(0));
    }

    #[test]
    fn a_counter_that_goes_back_is_no_rate_below_zero() {
        let (rate, start) = (CpuRate::default(), Instant::now());
        rate.observe(u64::MAX, start);
        assert_eq!(rate.observe(0, start + Duration::from_secs(5)), Some(0));
        assert_eq!(rate.observe(u64::MAX, start + Duration::from_secs(6)), None);
    }
}
