//! A container's limits, for its cgroup in the guest.

use isopod_proto::agent::Resources;

use super::SpecError;
use crate::cpu_set::CpuSet;
use crate::cri;

/// The guest's form of CRI's limits; 0 in CRI means "as it is".
pub fn to_guest(limits: &cri::LinuxContainerResources) -> Result<Resources, SpecError> {
    let invalid = |field, value: i64| SpecError::Invalid { field, problem: format!("{value} is negative") };
    let natural = |field, value: i64| match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(invalid(field, value)),
    };
    // The kubelet lists every page size of the node with 0, which asks for nothing.
    if let Some(huge) = limits.hugepage_limits.iter().find(|huge| huge.limit != 0) {
        return Err(SpecError::Unsupported {
            field: "linux.resources.hugepage_limits",
            what: format!("huge pages ({})", huge.page_size.chars().take(20).collect::<String>()),
        });
    }
    for (field, value) in
        [("linux.resources.cpuset_cpus", &limits.cpuset_cpus), ("linux.resources.cpuset_mems", &limits.cpuset_mems)]
    {
        if !value.is_empty() && CpuSet::parse(value).is_none() {
            let shown: String = value.chars().take(80).collect();
            return Err(SpecError::Invalid { field, problem: format!("{shown:?} is not a list of numbers") });
        }
    }
    let given = |value: i64| (value != 0).then_some(value);
    Ok(Resources {
        cpu_shares: natural("linux.resources.cpu_shares", limits.cpu_shares)?,
        cpu_quota_micros: given(limits.cpu_quota),
        cpu_period_micros: natural("linux.resources.cpu_period", limits.cpu_period)?,
        memory_limit_bytes: given(limits.memory_limit_in_bytes),
        memory_swap_limit_bytes: given(limits.memory_swap_limit_in_bytes),
        pids_limit: None,
        // They are numbers of the host, which restricts the VM to them.
        cpuset_cpus: String::new(),
        cpuset_mems: String::new(),
        unified: limits.unified.clone(),
    })
}

/// `old` with everything that `update` gives; 0 and empty in CRI mean "as it is". `oom_score_adj` is the process's, given at its
/// start, and stays.
pub fn merged(
    old: &cri::LinuxContainerResources,
    update: &cri::LinuxContainerResources,
) -> cri::LinuxContainerResources {
    let cri::LinuxContainerResources {
        cpu_period,
        cpu_quota,
        cpu_shares,
        memory_limit_in_bytes,
        oom_score_adj: _,
        cpuset_cpus,
        cpuset_mems,
        hugepage_limits,
        unified,
        memory_swap_limit_in_bytes,
    } = update.clone();
    let number = |old: i64, new: i64| if new == 0 { old } else { new };
    let text = |old: &String, new: String| if new.is_empty() { old.clone() } else { new };
    cri::LinuxContainerResources {
        cpu_period: number(old.cpu_period, cpu_period),
        cpu_quota: number(old.cpu_quota, cpu_quota),
        cpu_shares: number(old.cpu_shares, cpu_shares),
        memory_limit_in_bytes: number(old.memory_limit_in_bytes, memory_limit_in_bytes),
        oom_score_adj: old.oom_score_adj,
        cpuset_cpus: text(&old.cpuset_cpus, cpuset_cpus),
        cpuset_mems: text(&old.cpuset_mems, cpuset_mems),
        hugepage_limits: if hugepage_limits.is_empty() { old.hugepage_limits.clone() } else { hugepage_limits },
        unified: old.unified.clone().into_iter().chain(unified).collect(),
        memory_swap_limit_in_bytes: number(old.memory_swap_limit_in_bytes, memory_swap_limit_in_bytes),
    }
}

/// `limits` with "no limit" said in so many words, to get back to them from others.
pub fn explicit(limits: &cri::LinuxContainerResources) -> cri::LinuxContainerResources {
    let number = |value: i64, default: i64| if value == 0 { default } else { value };
    cri::LinuxContainerResources {
        cpu_period: number(limits.cpu_period, 100_000),
        cpu_quota: number(limits.cpu_quota, -1),
        memory_limit_in_bytes: number(limits.memory_limit_in_bytes, -1),
        memory_swap_limit_in_bytes: number(limits.memory_swap_limit_in_bytes, -1),
        ..limits.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_what_it_gives_and_nothing_else() {
        let old = cri::LinuxContainerResources {
            cpu_shares: 512,
            memory_limit_in_bytes: 1 << 20,
            oom_score_adj: 7,
            unified: [("memory.low".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(merged(&old, &cri::LinuxContainerResources::default()), old);
        let update = cri::LinuxContainerResources {
            cpu_quota: -1,
            memory_limit_in_bytes: 2 << 20,
            oom_score_adj: 9,
            unified: [("memory.high".to_owned(), "2".to_owned())].into(),
            ..Default::default()
        };
        let new = merged(&old, &update);
        assert_eq!((new.cpu_shares, new.cpu_quota, new.memory_limit_in_bytes), (512, -1, 2 << 20));
        assert_eq!((new.oom_score_adj, new.unified.len()), (7, 2));
    }

    #[test]
    fn zero_is_no_limit() {
        assert_eq!(to_guest(&cri::LinuxContainerResources::default()), Ok(Resources::default()));
    }

    #[test]
    fn limits_are_passed_on() {
        let limits = cri::LinuxContainerResources {
            cpu_quota: -1,
            cpu_period: 100_000,
            memory_limit_in_bytes: 15 << 20,
            ..Default::default()
        };
        let guest = to_guest(&limits).expect("valid");
        assert_eq!(guest.cpu_quota_micros, Some(-1));
        assert_eq!((guest.cpu_period_micros, guest.memory_limit_bytes), (Some(100_000), Some(15 << 20)));
    }

    #[test]
    fn huge_pages_are_refused_only_if_there_are_to_be_some() {
        let with = |limit| cri::LinuxContainerResources {
            hugepage_limits: vec![cri::HugepageLimit { page_size: "2MB".into(), limit }],
            ..Default::default()
        };
        assert!(to_guest(&with(0)).is_ok());
        assert!(matches!(to_guest(&with(1)), Err(SpecError::Unsupported { .. })));
    }

    #[test]
    fn cpu_sets_are_the_hosts_and_have_to_be_lists() {
        let cpus = |list: &str| cri::LinuxContainerResources { cpuset_cpus: list.into(), ..Default::default() };
        assert_eq!(to_guest(&cpus("0-1")), Ok(Resources::default()));
        assert!(to_guest(&cpus("1-0")).expect_err("refused").to_string().contains("cpuset_cpus"));
        let mems = cri::LinuxContainerResources { cpuset_mems: "zero".into(), ..Default::default() };
        assert!(to_guest(&mems).expect_err("refused").to_string().contains("cpuset_mems"));
    }

    #[test]
    fn negative_shares_are_refused() {
        let limits = cri::LinuxContainerResources { cpu_shares: -2, ..Default::default() };
        assert!(to_guest(&limits).expect_err("negative").to_string().contains("cpu_shares"));
    }
}
