//! Classic BPF as seccomp has it (seccomp(2), linux/filter.h): instructions, and the comparison of one argument.

use super::profile::{Condition, Operator};

/// `BPF_LD | BPF_W | BPF_ABS`: A = the 32-bit word at offset k of `struct seccomp_data`.
pub const LOAD: u16 = 0x20;
/// `BPF_ALU | BPF_AND | BPF_K`: A &= k.
pub const AND: u16 = 0x54;
/// `BPF_JMP | BPF_JA`: forward by k.
pub const JUMP: u16 = 0x05;
/// `BPF_JMP | BPF_JEQ | BPF_K`: A == k.
pub const EQUAL: u16 = 0x15;
/// `BPF_JMP | BPF_JGT | BPF_K`: A > k.
pub const GREATER: u16 = 0x25;
/// `BPF_JMP | BPF_JGE | BPF_K`: A >= k.
pub const GREATER_OR_EQUAL: u16 = 0x35;
/// `BPF_RET | BPF_K`.
pub const RETURN: u16 = 0x06;

/// Offset of the system call's number in `struct seccomp_data`.
pub const NUMBER: u32 = 0;
/// Offset of the architecture.
pub const ARCHITECTURE: u32 = 4;
/// Offset of the first argument; each has 8 bytes, the low word first.
const ARGUMENTS: u32 = 16;

/// One instruction, `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// How many instructions are left out if a condition is true.
    pub when_true: u8,
    /// And if it is false.
    pub when_false: u8,
    /// Its operand.
    pub k: u32,
}

impl Instruction {
    /// One without a condition.
    pub fn plain(code: u16, k: u32) -> Self {
        Self { code, when_true: 0, when_false: 0, k }
    }
}

/// The program as the kernel takes it.
pub fn encode(program: &[Instruction]) -> Vec<u8> {
    let bytes = |instruction: &Instruction| {
        let Instruction { code, when_true, when_false, k } = *instruction;
        let ([c0, c1], [k0, k1, k2, k3]) = (code.to_le_bytes(), k.to_le_bytes());
        [c0, c1, when_true, when_false, k0, k1, k2, k3]
    };
    program.iter().flat_map(bytes).collect()
}

/// Where a conditional jump goes.
#[derive(Clone, Copy)]
enum To {
    /// Forward by so many instructions.
    Skip(u8),
    /// Behind the code of all conditions and what they lead to.
    Fail,
}

const NEXT: To = To::Skip(0);

/// Code that goes on to its end, where `then` is returned, if all `conditions` hold, and behind it if one does not.
/// There must be at most six conditions, one for each argument.
pub fn alternative(conditions: &[Condition], then: u32) -> Vec<Instruction> {
    let steps: Vec<(u16, u32, To, To)> = conditions.iter().flat_map(comparison).collect();
    let length = steps.len() + 1;
    let mut code: Vec<Instruction> = Vec::with_capacity(length);
    for (code_of, k, when_true, when_false) in steps {
        let behind = u8::try_from(length - (code.len() + 1)).expect("six conditions have at most 37 instructions");
        let distance = |to: To| match to {
            To::Skip(count) => count,
            To::Fail => behind,
        };
        let (when_true, when_false) = (distance(when_true), distance(when_false));
        code.push(Instruction { code: code_of, when_true, when_false, k });
    }
    code.push(Instruction::plain(RETURN, then));
    code
}

/// The comparison of a 64-bit argument, word by word.
fn comparison(condition: &Condition) -> Vec<(u16, u32, To, To)> {
    let low = ARGUMENTS + 8 * u32::from(condition.index);
    let load = |offset: u32| (LOAD, offset, NEXT, NEXT);
    let (high_word, low_word) = (|value: u64| (value >> 32) as u32, |value: u64| value as u32);
    // Decided by the high words, or if they are equal by the low ones.
    let ordered = |value: u64, above: To, below: To, code: u16, yes: To, no: To| {
        vec![
            load(low + 4),
            (GREATER, high_word(value), above, NEXT),
            (EQUAL, high_word(value), NEXT, below),
            load(low),
            (code, low_word(value), yes, no),
        ]
    };
    match condition.operator {
        Operator::Equal(value) => vec![
            load(low + 4),
            (EQUAL, high_word(value), NEXT, To::Fail),
            load(low),
            (EQUAL, low_word(value), NEXT, To::Fail),
        ],
        Operator::NotEqual(value) => vec![
            load(low + 4),
            (EQUAL, high_word(value), NEXT, To::Skip(2)),
            load(low),
            (EQUAL, low_word(value), To::Fail, NEXT),
        ],
        Operator::Greater(value) => ordered(value, To::Skip(3), To::Fail, GREATER, NEXT, To::Fail),
        Operator::GreaterOrEqual(value) => ordered(value, To::Skip(3), To::Fail, GREATER_OR_EQUAL, NEXT, To::Fail),
        Operator::Less(value) => ordered(value, To::Fail, To::Skip(2), GREATER_OR_EQUAL, To::Fail, NEXT),
        Operator::LessOrEqual(value) => ordered(value, To::Fail, To::Skip(2), GREATER, To::Fail, NEXT),
        Operator::MaskedEqual { mask, value } => vec![
            load(low + 4),
            (AND, high_word(mask), NEXT, NEXT),
            (EQUAL, high_word(value & mask), NEXT, To::Fail),
            load(low),
            (AND, low_word(mask), NEXT, NEXT),
            (EQUAL, low_word(value & mask), NEXT, To::Fail),
        ],
    }
}
