//! Which blocks of the range the guest has. Pure, and total for whatever a driver asks.

use std::ops::Range;

/// Bytes of a block, in which memory is given and taken: what Linux takes or more, so that all of a request can be had.
pub const BLOCK_BYTES: u64 = 4 << 20;

/// What can be said of a run of blocks (virtio 1.2, 5.15.6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

/// Why a request is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// More than was requested.
    Nack,
    /// No such blocks, or not in the state that the request is for.
    Error,
}

/// The blocks of the range.
#[derive(Debug)]
pub(super) struct Blocks {
    start: u64,
    plugged: Vec<bool>,
    count: usize,
    requested: usize,
}

impl Blocks {
    /// `length` bytes from guest-physical `start` on, of which the guest has none; both are multiples of [`BLOCK_BYTES`].
    pub fn new(start: u64, length: u64) -> Self {
        let count = usize::try_from(length / BLOCK_BYTES).unwrap_or(0);
        Self { start, plugged: vec![false; count], count: 0, requested: 0 }
    }

    /// Guest-physical address of the range.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of the range.
    pub fn length(&self) -> u64 {
        self.plugged.len() as u64 * BLOCK_BYTES
    }

    /// Bytes that the guest has.
    pub fn plugged_bytes(&self) -> u64 {
        self.count as u64 * BLOCK_BYTES
    }

    /// Bytes that it should have.
    pub fn requested_bytes(&self) -> u64 {
        self.requested as u64 * BLOCK_BYTES
    }

    /// It should have so many bytes. `None`: that is not a number of blocks of the range.
    pub fn request(&mut self, bytes: u64) -> Option<()> {
        let blocks = usize::try_from(bytes / BLOCK_BYTES).ok()?;
        let possible = bytes.is_multiple_of(BLOCK_BYTES) && blocks <= self.plugged.len();
        possible.then(|| self.requested = blocks)
    }

    /// `count` blocks from guest-physical `address` on, at least one.
    pub fn find(&self, address: u64, count: u16) -> Result<Range<usize>, Refusal> {
        let offset = address.checked_sub(self.start).filter(|offset| offset.is_multiple_of(BLOCK_BYTES));
        let first = offset.and_then(|offset| usize::try_from(offset / BLOCK_BYTES).ok()).ok_or(Refusal::Error)?;
        let end = first.checked_add(usize::from(count)).filter(|end| *end <= self.plugged.len());
        let range = first..end.ok_or(Refusal::Error)?;
        if range.is_empty() { Err(Refusal::Error) } else { Ok(range) }
    }

    /// The state of some blocks together.
    pub fn state(&self, range: Range<usize>) -> State {
        let (mut plugged, mut unplugged) = (false, false);
        for block in &self.plugged[range] {
            plugged |= *block;
            unplugged |= !*block;
        }
        match (plugged, unplugged) {
            (true, true) => State::Mixed,
            (true, false) => State::Plugged,
            (false, _) => State::Unplugged,
        }
    }

    /// Whether these blocks may become `to`, which is not mixed.
    pub fn check(&self, range: &Range<usize>, to: State) -> Result<(), Refusal> {
        let state = self.state(range.clone());
        match to {
            State::Plugged if state != State::Unplugged => Err(Refusal::Error),
            State::Plugged if self.count + range.len() > self.requested => Err(Refusal::Nack),
            State::Unplugged if state != State::Plugged => Err(Refusal::Error),
            _ => Ok(()),
        }
    }

    /// They have become `to`.
    pub fn set(&mut self, range: Range<usize>, to: State) {
        let plugged = to == State::Plugged;
        for block in &mut self.plugged[range] {
            self.count = self.count + usize::from(plugged) - usize::from(*block);
            *block = plugged;
        }
    }

    /// The runs of blocks that the guest has.
    pub fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = vec![];
        for (block, _) in self.plugged.iter().enumerate().filter(|(_, plugged)| **plugged) {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }
}

/// Offset and length of some blocks, in bytes.
pub(super) fn bytes(range: &Range<usize>) -> (u64, u64) {
    (range.start as u64 * BLOCK_BYTES, range.len() as u64 * BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 1 << 32;

    fn address(block: u64) -> u64 {
        START + block * BLOCK_BYTES
    }

    #[test]
    fn blocks_outside_of_the_range_are_none() {
        let blocks = Blocks::new(START, 8 * BLOCK_BYTES);
        assert_eq!(blocks.find(address(2), 3), Ok(2..5));
        assert_eq!(blocks.find(address(0), 8), Ok(0..8));
        for (address, count) in [
            (address(0), 0),
            (address(0), 9),
            (address(7), 2),
            (address(8), 1),
            (address(1) + 4096, 1),
            (0, 1),
            (START - BLOCK_BYTES, 2),
            (u64::MAX - BLOCK_BYTES + 1, u16::MAX),
        ] {
            assert_eq!(blocks.find(address, count), Err(Refusal::Error), "{count} at {address:#x}");
        }
    }

    #[test]
    fn a_request_is_a_number_of_blocks_of_the_range() {
        let mut blocks = Blocks::new(START, 8 * BLOCK_BYTES);
        for bad in [1, BLOCK_BYTES - 4096, 9 * BLOCK_BYTES, u64::MAX] {
            assert_eq!(blocks.request(bad), None, "{bad}");
        }
        assert_eq!((blocks.request(8 * BLOCK_BYTES), blocks.requested_bytes()), (Some(()), 8 * BLOCK_BYTES));
        assert_eq!((blocks.request(0), blocks.requested_bytes()), (Some(()), 0));
    }

    proptest! {
        /// Whatever is asked: a block is given only if it was not, and taken only if it was, and never more are given than requested.
        #[test]
        fn what_the_guest_has_is_what_was_granted(
            asked in prop::collection::vec((0u64..12, 0u16..5, any::<bool>(), prop::option::of(0u64..10)), 0..60),
        ) {
            let mut blocks = Blocks::new(START, 8 * BLOCK_BYTES);
            let mut model = [false; 8];
            for (block, count, plug, request) in asked {
                if let Some(request) = request {
                    prop_assert_eq!(blocks.request(request * BLOCK_BYTES).is_some(), request <= 8);
                }
                let to = if plug { State::Plugged } else { State::Unplugged };
                let had = blocks.plugged_bytes();
                let granted = blocks.find(address(block), count).and_then(|range| {
                    blocks.check(&range, to)?;
                    Ok(range)
                });
                if let Ok(range) = granted {
                    for index in range.clone() {
                        prop_assert_eq!(std::mem::replace(&mut model[index], plug), !plug);
                    }
                    blocks.set(range, to);
                    prop_assert!(!plug || blocks.plugged_bytes() <= blocks.requested_bytes());
                } else {
                    prop_assert_eq!(blocks.plugged_bytes(), had);
                }
                let runs = blocks.runs();
                prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
                let in_runs: Vec<usize> = runs.into_iter().flatten().collect();
                let in_model: Vec<usize> = (0..8).filter(|index| model[*index]).collect();
                prop_assert_eq!(in_runs, in_model);
            }
        }
    }
}
