//! Which user each sandbox's VMM is: one that no other sandbox of this daemon has, from claiming it until the sandbox is forgotten.

use std::collections::BTreeMap;

use isopod_proto::{ErrorKind, ObjectId};
use parking_lot::Mutex;

use crate::config::UserRange;

/// Every user is taken.
#[derive(Debug, thiserror::Error)]
#[error("all {} users from {} on are other sandboxes' (vmm.first_uid, vmm.uids)", range.count, range.first)]
pub struct NoUser {
    range: UserRange,
}

impl NoUser {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::ResourceExhausted
    }
}

/// The users and whose they are.
pub struct Users {
    range: UserRange,
    taken: Mutex<BTreeMap<u32, ObjectId>>,
}

impl Users {
    /// The users of `range`, none taken.
    pub fn new(range: UserRange) -> Self {
        Self { range, taken: Mutex::default() }
    }

    /// A free user for `sandbox`. Where the search begins follows from the sandbox's random id, so that neither a user whose
    /// sandbox has just gone is the next one's, nor two daemons with one range are likely to share one.
    pub fn claim(&self, sandbox: &ObjectId) -> Result<u32, NoUser> {
        let UserRange { first, count } = self.range;
        let start = u64::from_str_radix(sandbox.short(), 16).unwrap_or_default() % u64::from(count);
        let mut taken = self.taken.lock();
        let mut users = (0..count).map(|step| first + ((start + u64::from(step)) % u64::from(count)) as u32);
        let user = users.find(|user| !taken.contains_key(user)).ok_or(NoUser { range: self.range })?;
        taken.insert(user, sandbox.clone());
        Ok(user)
    }

    /// `sandbox` has `user` from an earlier daemon.
    pub fn keep(&self, user: u32, sandbox: &ObjectId) {
        self.taken.lock().insert(user, sandbox.clone());
    }

    /// `sandbox` is no more.
    pub fn release(&self, sandbox: &ObjectId) {
        self.taken.lock().retain(|_, owner| owner != sandbox);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> ObjectId {
        ObjectId::from_random([byte; 32])
    }

    fn users() -> Users {
        Users::new(UserRange { first: 5000, count: 3 })
    }

    #[test]
    fn live_sandboxes_have_different_users_and_the_last_one_is_followed_by_an_error() {
        let users = users();
        let mut all: Vec<_> = (1..=3).map(|byte| users.claim(&id(byte)).expect("one is free")).collect();
        all.sort_unstable();
        assert_eq!(all, [5000, 5001, 5002]);
        let error = users.claim(&id(4)).expect_err("none is free");
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert!(error.to_string().contains("3 users from 5000"), "{error}");
    }

    #[test]
    fn a_user_is_free_again_only_when_its_sandbox_is_gone() {
        let users = users();
        let first = users.claim(&id(1)).expect("free");
        users.claim(&id(2)).expect("free");
        users.claim(&id(3)).expect("free");
        users.release(&id(1));
        assert_eq!(users.claim(&id(4)).expect("one is free again"), first);
    }

    #[test]
    fn users_of_an_earlier_daemon_are_taken_even_outside_of_the_range() {
        let users = users();
        for (user, byte) in [(5000, 1), (5002, 2), (77, 3)] {
            users.keep(user, &id(byte));
        }
        assert_eq!(users.claim(&id(4)).expect("one is free"), 5001);
        assert!(users.claim(&id(5)).is_err());
    }
}
