//! Sets of CPUs, or of memory nodes, as cpuset(7) writes them: "0-2,7".
//!
//! CRI names the host's. They are kept on the host, for the VMM of the pod: what its containers may use together
//! (`sandbox/cpu_sets.rs`). Which of them a container's own processes use is not told to the guest, whose CPUs have no fixed place.

use std::collections::BTreeSet;
use std::fmt;

/// The largest number there can be (CONFIG_NR_CPUS is at most 8192 on x86-64).
const MAX: u32 = 8191;

/// A set, not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    /// Reads a list; none if it is not one.
    pub fn parse(list: &str) -> Option<Self> {
        let mut set = BTreeSet::new();
        for part in list.trim().split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| {
                let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
                text.parse().ok().filter(|number| digits && *number <= MAX)
            };
            let (first, last): (u32, u32) = (number(first)?, number(last)?);
            if first > last {
                return None;
            }
            set.extend(first..=last);
        }
        Some(Self(set))
    }

    /// A bit a number, the lowest first.
    pub fn mask(&self) -> Vec<u8> {
        let mut mask = vec![0; self.0.last().map_or(0, |last| *last as usize / 8 + 1)];
        for number in &self.0 {
            mask[*number as usize / 8] |= 1 << (number % 8);
        }
        mask
    }

    /// What is in one of them.
    pub fn union(self, other: Self) -> Self {
        Self(self.0.into_iter().chain(other.0).collect())
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if(|next| *next == last + 1) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_list_is_read_as_the_kernel_reads_it() {
        let of = |list: &str| CpuSet::parse(list).map(|set| set.to_string());
        assert_eq!(of("0").as_deref(), Some("0"));
        assert_eq!(of("7,0-2,1-3\n").as_deref(), Some("0-3,7"));
        assert_eq!(of("8190-8191").as_deref(), Some("8190-8191"));
        for bad in ["", ",", "1,", "-1", "1-", "2-1", "+1", "0x1", "8192", "4294967296", "a", "1 2", "0-99999999999"] {
            assert_eq!(of(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_mask_has_a_bit_a_number() {
        assert_eq!(CpuSet::parse("0,2,8").expect("a list").mask(), [0b101, 1]);
        assert_eq!(CpuSet::parse("15").expect("a list").mask(), [0, 0b1000_0000]);
    }

    #[test]
    fn a_union_has_what_both_have() {
        let of = |list| CpuSet::parse(list).expect("a list");
        assert_eq!(of("0,2").union(of("1,8")).to_string(), "0-2,8");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(numbers in proptest::collection::btree_set(0..=MAX, 1..40), text in ".{0,40}") {
            let set = CpuSet(numbers);
            prop_assert_eq!(CpuSet::parse(&set.to_string()), Some(set));
            let _ = CpuSet::parse(&text);
        }
    }
}
