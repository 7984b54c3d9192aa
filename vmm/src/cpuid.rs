//! What a vCPU's CPUID says: what KVM supports, with each vCPU's own APIC id and the VM's topology, which is one socket of
//! single-threaded cores (Intel SDM volume 2A "CPUID"; AMD APM volume 3, appendix E).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
const FEATURE_HTT: u32 = 1 << 28;
const AMD_CMP_LEGACY: u32 = 1 << 1;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Offers the local APIC timer's TSC-deadline mode, which KVM supports but does not list.
pub fn offer_tsc_deadline(cpuid: &mut CpuId) {
    for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= FEATURE_TSC_DEADLINE;
    }
}

/// The first thing missing in `supported` that 64-bit Linux cannot do without.
pub fn lacks_for_linux(supported: &CpuId) -> Option<&'static str> {
    let leaf = |function| supported.as_slice().iter().find(|entry| entry.function == function);
    let features = leaf(1).map_or(0, |entry| entry.edx);
    let extended = leaf(0x8000_0001).map_or(0, |entry| entry.edx);
    let needed = [
        (features, 4, "the time-stamp counter"),
        (features, 5, "model-specific registers"),
        (features, 6, "physical address extension"),
        (features, 8, "CMPXCHG8B"),
        (features, 9, "a local APIC"),
        (features, 24, "FXSAVE"),
        (features, 26, "SSE2"),
        (extended, 29, "long mode"),
    ];
    needed.into_iter().find(|(bits, bit, _)| bits & (1 << bit) == 0).map(|(_, _, name)| name)
}

/// CPUID of vCPU `index` of `count`, whose APIC id is its index.
pub fn for_vcpu(supported: &CpuId, index: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    // CPUID levels above what was there are not invented; a leaf that is there is rewritten.
    cpuid.retain(|entry| !(matches!(entry.function, 0xb | 0x1f) && entry.index > 1));
    for entry in cpuid.as_mut_slice() {
        patch(entry, u32::from(index), u32::from(count));
    }
    cpuid
}

/// Bits of the APIC id that tell cores apart.
fn core_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn patch(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | (id << 24) | (count << 16);
            entry.ecx |= FEATURE_HYPERVISOR;
            entry.edx = if count > 1 { entry.edx | FEATURE_HTT } else { entry.edx & !FEATURE_HTT };
        }
        // Deterministic cache parameters: cores in the package, and who shares a cache (all share level 3 and up).
        4 => {
            let level = (entry.eax >> 5) & 7;
            let sharers = if level >= 3 { (1 << core_bits(count)) - 1 } else { 0 };
            let cores = ((1 << core_bits(count)) - 1) & 0x3f;
            if entry.eax & 0x1f != 0 {
                entry.eax = (entry.eax & 0x3fff) | (sharers << 14) | (cores << 26);
            }
        }
        0xb | 0x1f => {
            entry.edx = id;
            let (shift, processors, level) = match entry.index {
                0 => (0, 1, LEVEL_SMT),
                _ => (core_bits(count), count, LEVEL_CORE),
            };
            entry.eax = shift;
            entry.ebx = processors;
            entry.ecx = entry.index | (level << 8);
        }
        0x8000_0001 => {
            entry.ecx = if count > 1 { entry.ecx | AMD_CMP_LEGACY } else { entry.ecx & !AMD_CMP_LEGACY };
        }
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | (core_bits(count) << 12),
        0x8000_001d => {
            let level = (entry.eax >> 5) & 7;
            let sharers = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharers << 14);
        }
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported(leaves: &[(u32, u32)]) -> CpuId {
        let entries: Vec<_> = leaves
            .iter()
            .map(|&(function, index)| kvm_cpuid_entry2 { function, index, eax: 0x43, ..Default::default() })
            .collect();
        CpuId::from_entries(&entries).expect("few entries")
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).expect("present")
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_every_leaf_that_has_one() {
        let supported = supported(&[(1, 0), (0xb, 0), (0xb, 1), (0x8000_001e, 0)]);
        for index in 0..3 {
            let cpuid = for_vcpu(&supported, index, 3);
            assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, u32::from(index));
            assert_eq!(leaf(&cpuid, 0xb, 0).edx, u32::from(index));
            assert_eq!(leaf(&cpuid, 0xb, 1).edx, u32::from(index));
            assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, u32::from(index));
        }
    }

    #[test]
    fn topology_is_one_socket_of_single_threaded_cores() {
        let cpuid = for_vcpu(&supported(&[(1, 0), (4, 3), (0xb, 0), (0xb, 1), (0x8000_0008, 0)]), 0, 6);
        assert_eq!((leaf(&cpuid, 0xb, 0).eax, leaf(&cpuid, 0xb, 0).ebx), (0, 1));
        assert_eq!((leaf(&cpuid, 0xb, 1).eax, leaf(&cpuid, 0xb, 1).ebx), (3, 6));
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 5 | (3 << 12));
        assert_ne!(leaf(&cpuid, 1, 0).edx & FEATURE_HTT, 0);
    }

    #[test]
    fn one_vcpu_has_no_siblings() {
        let cpuid = for_vcpu(&supported(&[(1, 0), (0xb, 1)]), 0, 1);
        assert_eq!(leaf(&cpuid, 1, 0).edx & FEATURE_HTT, 0);
        assert_eq!((leaf(&cpuid, 0xb, 1).eax, leaf(&cpuid, 0xb, 1).ebx), (0, 1));
    }

    #[test]
    fn a_processor_without_long_mode_is_named_as_such() {
        let entries = [
            kvm_cpuid_entry2 { function: 1, edx: u32::MAX, ..Default::default() },
            kvm_cpuid_entry2 { function: 0x8000_0001, ..Default::default() },
        ];
        assert_eq!(lacks_for_linux(&CpuId::from_entries(&entries).expect("two")), Some("long mode"));
    }
}
