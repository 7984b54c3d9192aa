//! Which devices the processes of a container may use: those in its /dev, terminals, and no other. In cgroup v2 a BPF program
//! says so (Documentation/admin-guide/cgroup-v2.rst, "Device controller").
//!
//! Making a node is not using it and is left to CAP_MKNOD, as in other runtimes: images are unpacked in containers.

use std::os::fd::BorrowedFd;

use crate::error::{Context as _, Result};
use crate::stub::message::Device;
use crate::sys::bpf::{Instruction, attach_device_program};

/// Character devices that every container has besides its nodes: /dev/ptmx, and major numbers of terminals of a devpts.
const PTMX: (u32, u32) = (5, 2);
const TERMINALS: std::ops::RangeInclusive<u32> = 136..=143;

/// `BPF_DEVCG_DEV_BLOCK` and `BPF_DEVCG_DEV_CHAR`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
/// `BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE`.
const USE: i32 = 2 | 4;

/// Lets processes of `cgroup` use `devices` and terminals only.
pub fn restrict(cgroup: BorrowedFd<'_>, devices: &[Device]) -> Result<()> {
    attach_device_program(cgroup, &program(devices)).context(|| "restrict the container's use of devices")
}

/// Registers: 2 the type, 3 the access, 4 the major and 5 the minor number of what is asked about; 0 the answer.
fn program(devices: &[Device]) -> Vec<Instruction> {
    let [allow, refuse] = [1, 0].map(|answer| [instruction(SET, 0, 0, answer), instruction(EXIT, 0, 0, 0)]);
    // struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor; 32 bits each.
    let mut code = vec![
        instruction(LOAD, 0x12, 0, 0),
        instruction(LOAD, 0x14, 4, 0),
        instruction(LOAD, 0x15, 8, 0),
        instruction(COPY, 0x23, 0, 0),
        instruction(AND, 2, 0, 0xffff),
        instruction(SHIFT_RIGHT, 3, 0, 16),
        instruction(AND, 3, 0, USE),
        instruction(SKIP_UNLESS_EQUAL, 3, 2, 0),
    ];
    code.extend(allow);
    let mut add = |kind: i32, major: u32, minor: Option<u32>| {
        // Numbers of devices have at most 20 bits in Linux (linux/kdev_t.h).
        let (Ok(major), Ok(minor)) = (i32::try_from(major), minor.map(i32::try_from).transpose()) else { return };
        let numbers = 2 + i16::from(minor.is_some());
        let mut left = numbers + 2;
        for (register, wanted) in [(2, Some(kind)), (4, Some(major)), (5, minor)] {
            let Some(wanted) = wanted else { continue };
            left -= 1;
            code.push(instruction(SKIP_UNLESS_EQUAL, register, left, wanted));
        }
        code.extend(allow);
    };
    for Device { block, major, minor, .. } in devices {
        add(if *block { BLOCK } else { CHARACTER }, *major, Some(*minor));
    }
    add(CHARACTER, PTMX.0, Some(PTMX.1));
    for major in TERMINALS {
        add(CHARACTER, major, None);
    }
    code.extend(refuse);
    code
}

/// Codes of instructions (linux/bpf.h, linux/bpf_common.h).
const LOAD: u8 = 0x61;
const COPY: u8 = 0xbf;
const SET: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const SKIP_UNLESS_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers, offset, immediate }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs the program as the kernel does: whether the access is allowed.
    fn allowed(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            at += 1;
            match code {
                LOAD => {
                    assert_eq!(from, 1, "the context");
                    registers[to] = u64::from(context[usize::try_from(offset).unwrap() / 4]);
                }
                COPY => registers[to] = registers[from],
                SET => registers[to] = immediate as u64,
                AND => registers[to] &= immediate as u64,
                SHIFT_RIGHT => registers[to] >>= immediate,
                SKIP_UNLESS_EQUAL if registers[to] == immediate as u64 => {}
                SKIP_UNLESS_EQUAL => at += usize::try_from(offset).unwrap(),
                EXIT => return registers[0] == 1,
                other => panic!("{other:#x}"),
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_in_dev_may_be_used_and_everything_may_be_made(
            devices in prop::collection::vec((any::<bool>(), 0..6u32, 0..4u32), 0..6),
            (kind, access, major, minor) in (1..3u32, 1..8u32, prop_oneof![0..8u32, 134..146u32], 0..5u32),
        ) {
            let device = |&(block, major, minor): &(bool, u32, u32)| Device { block, major, minor, ..Device::default() };
            let program = program(&devices.iter().map(device).collect::<Vec<_>>());
            let given = devices.contains(&(kind == 1, major, minor));
            let terminal = kind == 2 && ((136..=143).contains(&major) || (major, minor) == (5, 2));
            prop_assert_eq!(allowed(&program, kind, access, major, minor), access == 1 || given || terminal);
        }
    }
}
