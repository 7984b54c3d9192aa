//! From a profile to a BPF program: a test of the architecture, then a binary search for the system call's number.
//!
//! What several rules for one system call mean together is as libseccomp, which other runtimes use, has it: a rule with the
//! default action says nothing; the first rule without conditions decides, wherever it stands; else the first whose conditions
//! hold.

use std::collections::BTreeMap;

use super::bpf::{self, ARCHITECTURE, EQUAL, GREATER_OR_EQUAL, Instruction, JUMP, LOAD, NUMBER, RETURN};
use super::profile::{Action, Condition, Profile, ProfileError, Rule};
use super::table::Architecture;

/// Most instructions of a program (BPF_MAXINSNS in linux/bpf_common.h).
pub const MAX_INSTRUCTIONS: usize = 4096;
/// Most alternatives of all system calls together, so that a hostile profile costs no more memory than a good one.
const MAX_ALTERNATIVES: usize = 1 << 16;
/// Numbers from here on are those of x32, an ABI that the guest's kernel does not have.
const X32: u32 = 0x4000_0000;
/// "There is no such system call", on which programs take another way.
const ENOSYS: Action = Action::Errno(38);

/// What is done with one system call.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Verdict<'p> {
    /// Conditions that all have to hold, and what is then done; the first that fits counts.
    alternatives: Vec<(&'p [Condition], Action)>,
    /// What is done if none does.
    otherwise: Action,
}

impl Verdict<'_> {
    fn plain(otherwise: Action) -> Self {
        Self { alternatives: Vec::new(), otherwise }
    }
}

/// The first number of a range, which goes to the next range's, and what is done with the numbers in it.
type Range<'p> = (u32, Verdict<'p>);

/// The program for `profile`.
///
/// # Errors
/// `TooLarge` if it has more than [`MAX_INSTRUCTIONS`].
pub fn compile(profile: &Profile) -> Result<Vec<Instruction>, ProfileError> {
    let mut native = vec![Instruction::plain(LOAD, NUMBER)];
    native.extend(search(&ranges(profile, Architecture::X86_64)?));

    let kill = Instruction::plain(RETURN, Action::KillProcess.value());
    let mut program = vec![Instruction::plain(LOAD, ARCHITECTURE)];
    program.extend(unless_equal(Architecture::X86_64.audit(), native.len()));
    program.extend(native);
    if profile.x86 {
        program.push(Instruction { when_true: 1, ..Instruction::plain(EQUAL, Architecture::X86.audit()) });
        program.push(kill);
        program.push(Instruction::plain(LOAD, NUMBER));
        program.extend(search(&ranges(profile, Architecture::X86)?));
    } else {
        program.push(kill);
    }
    if program.len() > MAX_INSTRUCTIONS { Err(ProfileError::TooLarge) } else { Ok(program) }
}

/// Leaves out the next `count` instructions unless A is `value`.
fn unless_equal(value: u32, count: usize) -> [Instruction; 2] {
    [Instruction { when_true: 1, ..Instruction::plain(EQUAL, value) }, jump(count)]
}

fn jump(count: usize) -> Instruction {
    // A longer program is refused as a whole.
    Instruction::plain(JUMP, u32::try_from(count).unwrap_or(u32::MAX))
}

/// All numbers, in ranges that are treated alike.
fn ranges<'p>(profile: &'p Profile, architecture: Architecture) -> Result<Vec<Range<'p>>, ProfileError> {
    let (verdicts, last) = verdicts(profile, architecture)?;
    let default = || Verdict::plain(profile.default);
    let mut ranges: Vec<Range<'p>> = Vec::new();
    let mut add = |start: u32, verdict: Verdict<'p>| match ranges.last() {
        Some((_, before)) if *before == verdict => {}
        _ => ranges.push((start, verdict)),
    };
    let mut next = 0;
    for (number, verdict) in verdicts {
        if number > next {
            add(next, default());
        }
        add(number, verdict);
        next = number + 1;
    }
    match last {
        // Whoever wrote the profile did not know of newer system calls. Refusing them as unknown lets a C library take the
        // older ones, which it would not do if they were forbidden.
        Some(last) if !profile.default.permits() => {
            if last >= next {
                add(next, default());
            }
            add(last + 1, Verdict::plain(ENOSYS));
        }
        _ => add(next, default()),
    }
    if architecture == Architecture::X86_64 {
        add(X32, Verdict::plain(ENOSYS));
    }
    Ok(ranges)
}

/// What is done with each system call that a rule is for, by number; and the largest number that is named.
fn verdicts(
    profile: &Profile,
    architecture: Architecture,
) -> Result<(BTreeMap<u32, Verdict<'_>>, Option<u32>), ProfileError> {
    let mut verdicts: BTreeMap<u32, Verdict<'_>> = BTreeMap::new();
    let mut unconditional = std::collections::BTreeSet::new();
    let mut last = None;
    let mut count = 0;
    for rule in &profile.rules {
        for number in rule.names.iter().filter_map(|name| architecture.number(name)) {
            last = last.max(Some(number));
            if rule.action == profile.default || unconditional.contains(&number) {
                continue;
            }
            if rule.conditions.is_empty() {
                unconditional.insert(number);
                verdicts.insert(number, Verdict::plain(rule.action));
                continue;
            }
            let verdict = verdicts.entry(number).or_insert_with(|| Verdict::plain(profile.default));
            let before = verdict.alternatives.len();
            verdict.alternatives.extend(alternatives(rule));
            count += verdict.alternatives.len() - before;
            if count > MAX_ALTERNATIVES {
                return Err(ProfileError::TooLarge);
            }
        }
    }
    Ok((verdicts, last))
}

/// The conditions of a rule together, or each by itself if two are on the same argument.
fn alternatives(rule: &Rule) -> impl Iterator<Item = (&[Condition], Action)> {
    let conditions = rule.conditions.as_slice();
    let twice = |at: usize| conditions[..at].iter().any(|before| before.index == conditions[at].index);
    let size = if (0..conditions.len()).any(twice) { 1 } else { conditions.len() };
    conditions.chunks(size).map(|conditions| (conditions, rule.action))
}

/// Finds the range that A is in and does what it says.
fn search(ranges: &[Range<'_>]) -> Vec<Instruction> {
    let [(_, verdict)] = ranges else {
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        let [(start, _), ..] = upper else { return Vec::new() };
        let (lower, upper) = (search(lower), search(upper));
        let mut code = match u8::try_from(lower.len()) {
            Ok(length) => vec![Instruction { when_true: length, ..Instruction::plain(GREATER_OR_EQUAL, *start) }],
            Err(_) => {
                vec![Instruction { when_false: 1, ..Instruction::plain(GREATER_OR_EQUAL, *start) }, jump(lower.len())]
            }
        };
        code.extend(lower);
        code.extend(upper);
        return code;
    };
    let alternative = |(conditions, action): &(&[Condition], Action)| bpf::alternative(conditions, action.value());
    let mut code: Vec<Instruction> = verdict.alternatives.iter().flat_map(alternative).collect();
    code.push(Instruction::plain(RETURN, verdict.otherwise.value()));
    code
}
