//! Cutting a stream of bytes into log entries.

use time::OffsetDateTime;

/// Longest text of one entry; a longer line is several entries.
pub const MAX_LINE: usize = 16 * 1024;

/// Cuts one stream. Bytes of a line whose end has not come are kept until it does, or there are [`MAX_LINE`] of them.
#[derive(Debug, Default)]
pub struct Lines {
    kept: Vec<u8>,
}

impl Lines {
    /// Takes bytes; appends the entries they complete to `entries`, and gives how many bytes of the stream those stand for.
    pub fn push(&mut self, bytes: &[u8], stream: &str, now: OffsetDateTime, entries: &mut Vec<u8>) -> u64 {
        let heads = Heads::new(stream, now);
        let mut taken = 0;
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.kept.extend_from_slice(part);
            let ended = self.kept.last() == Some(&b'\n');
            // The line's end, or its "\r\n", is not part of the text; nor does it count for the length.
            let text_length = |kept: &[u8]| {
                if !ended {
                    return kept.len();
                }
                let text = &kept[..kept.len() - 1];
                text.strip_suffix(b"\r").unwrap_or(text).len()
            };
            while text_length(&self.kept) > MAX_LINE {
                entry(entries, &heads.part, &self.kept[..MAX_LINE]);
                self.kept.drain(..MAX_LINE);
                taken += MAX_LINE as u64;
            }
            if ended {
                entry(entries, &heads.end, &self.kept[..text_length(&self.kept)]);
                taken += self.kept.len() as u64;
                self.kept.clear();
            }
        }
        taken
    }

    /// The stream has ended: what is left of a line without an end is an entry of its own.
    pub fn finish(&mut self, stream: &str, now: OffsetDateTime, entries: &mut Vec<u8>) -> u64 {
        if self.kept.is_empty() {
            return 0;
        }
        entry(entries, &Heads::new(stream, now).part, &self.kept);
        let taken = self.kept.len() as u64;
        self.kept.clear();
        taken
    }
}

/// What entries of one moment begin with. It is made once for all of a chunk, which may be thousands of empty lines.
struct Heads {
    part: String,
    end: String,
}

impl Heads {
    fn new(stream: &str, now: OffsetDateTime) -> Self {
        let now = now.to_offset(time::UtcOffset::UTC);
        let (date, clock) = (now.date(), now.time());
        let head = format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}Z {stream}",
            date.year(),
            u8::from(date.month()),
            date.day(),
            clock.hour(),
            clock.minute(),
            clock.second(),
            clock.nanosecond()
        );
        Self { part: format!("{head} P "), end: format!("{head} F ") }
    }
}

fn entry(entries: &mut Vec<u8>, head: &str, text: &[u8]) {
    entries.extend_from_slice(head.as_bytes());
    entries.extend_from_slice(text);
    entries.push(b'\n');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(chunks: &[&[u8]]) -> (String, u64) {
        let (mut lines, mut entries, mut taken) = (Lines::default(), Vec::new(), 0);
        for chunk in chunks {
            taken += lines.push(chunk, "stdout", OffsetDateTime::UNIX_EPOCH, &mut entries);
        }
        taken += lines.finish("stdout", OffsetDateTime::UNIX_EPOCH, &mut entries);
        (String::from_utf8(entries).expect("text"), taken)
    }

    const TIME: &str = "1970-01-01T00:00:00.000000000Z";

    #[test]
    fn a_line_is_one_full_entry_however_it_arrives() {
        let expected = format!("{TIME} stdout F hello\n");
        assert_eq!(written(&[b"hello\n"]), (expected.clone(), 6));
        assert_eq!(written(&[b"he", b"llo", b"\r", b"\n"]), (expected, 7));
    }

    #[test]
    fn an_empty_line_is_an_entry() {
        assert_eq!(written(&[b"\n"]).0, format!("{TIME} stdout F \n"));
    }

    #[test]
    fn text_without_an_end_is_partial() {
        assert_eq!(written(&[b"a\nb"]).0, format!("{TIME} stdout F a\n{TIME} stdout P b\n"));
    }

    #[test]
    fn a_long_line_is_cut_and_its_last_part_is_full() {
        let line = [vec![b'x'; MAX_LINE + 3], b"\n".to_vec()].concat();
        let text = written(&[&line]).0;
        let entries: Vec<&str> = text.lines().collect();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].len(), TIME.len() + " stdout P ".len() + MAX_LINE);
        assert_eq!(entries[1], format!("{TIME} stdout F xxx"));
    }

    #[test]
    fn a_line_of_exactly_the_most_bytes_is_one_entry() {
        let line = [vec![b'x'; MAX_LINE], b"\r\n".to_vec()].concat();
        assert_eq!(written(&[&line]).0.lines().count(), 1);
    }

    /// What the kubelet makes of a log: the text of partial entries runs on.
    fn read_back(log: &[u8]) -> Vec<u8> {
        let mut text = Vec::new();
        for line in log.split_inclusive(|byte| *byte == b'\n') {
            let content = &line[TIME.len() + " stdout P ".len()..line.len() - 1];
            text.extend_from_slice(content);
            if line[TIME.len() + " stdout ".len()] == b'F' {
                text.push(b'\n');
            }
        }
        text
    }

    proptest! {
        #[test]
        fn what_is_read_back_is_what_was_written(
            chunks in proptest::collection::vec(proptest::collection::vec(prop_oneof![3 => Just(b'a'), 1 => Just(b'\n')], 0..200), 0..20),
            long in 0usize..3 * MAX_LINE,
        ) {
            let mut chunks = chunks;
            chunks.push(vec![b'z'; long]);
            let (mut lines, mut entries, mut taken) = (Lines::default(), Vec::new(), 0);
            for chunk in &chunks {
                taken += lines.push(chunk, "stdout", OffsetDateTime::UNIX_EPOCH, &mut entries);
                prop_assert!(lines.kept.len() <= MAX_LINE + 2);
            }
            taken += lines.finish("stdout", OffsetDateTime::UNIX_EPOCH, &mut entries);
            let all = chunks.concat();
            prop_assert_eq!(taken, all.len() as u64);
            prop_assert_eq!(read_back(&entries), all);
        }
    }
}
