//! What of an output stream is kept: the bytes that were read from the process and that the daemon has not acknowledged.

use std::collections::VecDeque;

use isopod_proto::STREAM_WINDOW;

/// An offset that does not fit the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("offset {offset} is not between {first}, the first byte that is kept, and {end}, the end so far")]
pub struct OutOfWindow {
    offset: u64,
    first: u64,
    end: u64,
}

/// A stretch of a stream of bytes, with absolute offsets: `first..end` is kept, at most [`STREAM_WINDOW`] bytes.
#[derive(Debug, Default)]
pub struct Window {
    first: u64,
    bytes: VecDeque<u8>,
    finished: bool,
}

impl Window {
    /// How many bytes can be pushed now.
    pub fn room(&self) -> usize {
        STREAM_WINDOW - self.bytes.len()
    }

    /// The offset after the last byte that is there.
    pub fn end(&self) -> u64 {
        self.first + self.bytes.len() as u64
    }

    /// Appends `bytes`, of which there are at most [`Window::room`].
    pub fn push(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= self.room() && !self.finished);
        self.bytes.extend(bytes);
    }

    /// Says that no more bytes will come.
    pub fn finish(&mut self) {
        self.finished = true;
    }

    /// Forgets everything: nobody will take it any more.
    pub fn abandon(&mut self) {
        self.first = self.end();
        self.bytes = VecDeque::new();
        self.finished = true;
    }

    /// Whether [`Window::finish`] was called.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Whether no more bytes will come and all are acknowledged.
    pub fn is_drained(&self) -> bool {
        self.finished && self.bytes.is_empty()
    }

    /// Forgets the bytes before `offset`: the daemon has them.
    pub fn acknowledge(&mut self, offset: u64) -> Result<(), OutOfWindow> {
        let count = self.position(offset)?;
        self.bytes.drain(..count);
        self.first = offset;
        if self.is_drained() {
            self.bytes = VecDeque::new();
        }
        Ok(())
    }

    /// At most `limit` bytes from `offset` on; none at the end so far.
    pub fn read(&self, offset: u64, limit: usize) -> Result<Vec<u8>, OutOfWindow> {
        let position = self.position(offset)?;
        Ok(self.bytes.range(position..).take(limit).copied().collect())
    }

    fn position(&self, offset: u64) -> Result<usize, OutOfWindow> {
        let error = OutOfWindow { offset, first: self.first, end: self.end() };
        if offset > error.end {
            return Err(error);
        }
        let position = offset.checked_sub(self.first).ok_or(error)?;
        Ok(usize::try_from(position).expect("the window is small"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Push(usize),
        Acknowledge(u64),
        Read(u64, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..2 * STREAM_WINDOW).prop_map(Step::Push),
            (0..4 * STREAM_WINDOW as u64).prop_map(Step::Acknowledge),
            (0..4 * STREAM_WINDOW as u64, 0..STREAM_WINDOW).prop_map(|(offset, limit)| Step::Read(offset, limit)),
        ];
        proptest::collection::vec(step, 1..40)
    }

    fn byte_at(offset: u64) -> u8 {
        (offset % 251) as u8
    }

    proptest! {
        /// Against the simplest model: the offsets of what was acknowledged and of what was pushed.
        #[test]
        fn what_is_read_is_what_was_pushed(steps in steps()) {
            let mut window = Window::default();
            let (mut acknowledged, mut pushed) = (0u64, 0u64);
            for step in steps {
                match step {
                    Step::Push(count) => {
                        let count = count.min(window.room());
                        let bytes: Vec<u8> = (pushed..pushed + count as u64).map(byte_at).collect();
                        window.push(&bytes);
                        pushed += count as u64;
                    }
                    Step::Acknowledge(offset) => {
                        let valid = (acknowledged..=pushed).contains(&offset);
                        prop_assert_eq!(window.acknowledge(offset).is_ok(), valid);
                        acknowledged = if valid { offset } else { acknowledged };
                    }
                    Step::Read(offset, limit) => {
                        let valid = (acknowledged..=pushed).contains(&offset);
                        let end = pushed.min(offset.saturating_add(limit as u64));
                        let expected = valid.then(|| (offset..end).map(byte_at).collect::<Vec<u8>>());
                        prop_assert_eq!(window.read(offset, limit).ok(), expected);
                    }
                }
                prop_assert_eq!(window.end(), pushed);
                prop_assert_eq!(window.room() as u64, STREAM_WINDOW as u64 - (pushed - acknowledged));
            }
        }
    }

    #[test]
    fn a_finished_window_is_drained_once_all_is_acknowledged() {
        let mut window = Window::default();
        window.push(b"abc");
        window.finish();
        assert!(!window.is_drained());
        window.acknowledge(3).unwrap();
        assert!(window.is_drained());
        assert_eq!(window.read(3, 10).unwrap(), b"");
        assert!(window.read(2, 10).is_err());
    }
}
