//! Filters of system calls, each a list of what is allowed; everything else kills the process (seccomp(2)).
//!
//! A thread inherits the filters of the one that starts it and adds its own, and a call must pass all of them. So a thread's list
//! includes those of the threads it starts.

pub mod lists;

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// The number of a system call.
pub type Call = i64;

/// What is allowed.
#[derive(Clone, Debug, Default)]
pub struct Allowed(BTreeMap<Call, Vec<SeccompRule>>);

impl Allowed {
    /// Adds `calls` with any arguments.
    pub fn calls(mut self, calls: &[Call]) -> Self {
        self.0.extend(calls.iter().map(|call| (*call, vec![])));
        self
    }

    /// Adds `call` where its argument `index` (0 to 5) is one of `values`; only the lower 32 bits are looked at, as the kernel does
    /// for what is an `int` to it.
    pub fn with(self, call: Call, index: u8, values: &[u32]) -> Self {
        values.iter().fold(self, |all, value| all.rule(call, index, SeccompCmpOp::Eq, (*value).into()))
    }

    /// Adds `call` where the bits `mask` of its argument `index` are `value`.
    pub fn masked(self, call: Call, index: u8, mask: u32, value: u32) -> Self {
        self.rule(call, index, SeccompCmpOp::MaskedEq(mask.into()), value.into())
    }

    /// Adds all that `other` allows.
    pub fn and(mut self, other: &Self) -> Self {
        for (call, rules) in &other.0 {
            match self.0.get_mut(call) {
                // Without rules it is allowed whatever its arguments are.
                Some(own) if own.is_empty() => {}
                Some(own) if rules.is_empty() => own.clear(),
                Some(own) => {
                    let new: Vec<_> = rules.iter().filter(|rule| !own.contains(rule)).cloned().collect();
                    own.extend(new);
                }
                None => drop(self.0.insert(*call, rules.clone())),
            }
        }
        self
    }

    fn rule(mut self, call: Call, index: u8, operator: SeccompCmpOp, value: u64) -> Self {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
            .expect("a system call has six arguments");
        let rule = SeccompRule::new(vec![condition]).expect("there is a condition");
        match self.0.get_mut(&call) {
            Some(rules) if rules.is_empty() => {}
            Some(rules) if rules.contains(&rule) => {}
            Some(rules) => rules.push(rule),
            None => drop(self.0.insert(call, vec![rule])),
        }
        self
    }

    /// The program that kills the process at any other call, and at any call of another architecture.
    pub fn or_kill(self) -> Filter {
        Filter::compile(self.0, SeccompAction::KillProcess, SeccompAction::Allow)
    }
}

/// A program for the kernel.
#[derive(Clone, Debug)]
pub struct Filter(BpfProgram);

impl Filter {
    /// Lets `call` fail with `errno`, as on a kernel that does not have it, and nothing else; for use beside a filter that allows it.
    pub fn refusing(call: Call, errno: u32) -> Self {
        Self::compile([(call, vec![])].into(), SeccompAction::Allow, SeccompAction::Errno(errno))
    }

    fn compile(rules: BTreeMap<Call, Vec<SeccompRule>>, otherwise: SeccompAction, matching: SeccompAction) -> Self {
        let target = std::env::consts::ARCH.try_into().expect("isopod is for architectures that have seccomp");
        let filter = SeccompFilter::new(rules, otherwise, matching, target).expect("the two actions differ");
        Self(filter.try_into().expect("the lists are far shorter than the longest program"))
    }

    /// Puts the calling thread, and those it starts, under it for good. Sets no_new_privs, which it takes.
    pub fn apply(&self) -> io::Result<()> {
        seccompiler::apply_filter(&self.0).map_err(io::Error::other)
    }
}
