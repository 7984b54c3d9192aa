//! Lines cut into entries, and the form of an entry.

use std::io::Write;

use time::OffsetDateTime;

use super::LogStream;

/// Most bytes of content in an entry, as other runtimes have it; a longer line is several entries.
pub const MAX_CONTENT: usize = 16 * 1024;

/// Whether the entry ends its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// It does.
    Full,
    /// More of the line follows, or the stream ended within it.
    Partial,
}

/// The part of a line whose end has not come. At most [`MAX_CONTENT`] bytes, and a carriage return of which it is not known
/// yet whether it belongs to the line's end.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Takes bytes, and gives `entry` the content of each entry that is certain by now. Stops when `entry` returns false.
    /// Returns the bytes it did not take.
    pub fn push<'b>(&mut self, mut bytes: &'b [u8], mut entry: impl FnMut(Tag, &[u8]) -> bool) -> &'b [u8] {
        while !bytes.is_empty() {
            // One byte more than fits shows whether the line ends here, and a carriage return takes one more.
            let room = &bytes[..bytes.len().min(MAX_CONTENT + 2 - self.partial.len())];
            let end = room.iter().position(|byte| *byte == b'\n');
            self.partial.extend_from_slice(&room[..end.unwrap_or(room.len())]);
            bytes = &bytes[end.map_or(room.len(), |end| end + 1)..];
            let go_on = if end.is_some() { self.end_line(&mut entry) } else { self.split(&mut entry) };
            if !go_on {
                break;
            }
        }
        bytes
    }

    /// The line has ended.
    fn end_line(&mut self, entry: &mut impl FnMut(Tag, &[u8]) -> bool) -> bool {
        let content = self.partial.strip_suffix(b"\r").unwrap_or(&self.partial);
        let mut go_on = true;
        let (first, second) = content.split_at(content.len().min(MAX_CONTENT));
        if second.is_empty() {
            go_on &= entry(Tag::Full, first);
        } else {
            go_on &= entry(Tag::Partial, first);
            go_on &= entry(Tag::Full, second);
        }
        self.partial.clear();
        go_on
    }

    /// The line goes on: gives away what is too long for one entry.
    fn split(&mut self, entry: &mut impl FnMut(Tag, &[u8]) -> bool) -> bool {
        let more = self.partial.get(MAX_CONTENT..).unwrap_or_default();
        if more.is_empty() || more == b"\r" {
            return true;
        }
        let go_on = entry(Tag::Partial, &self.partial[..MAX_CONTENT]);
        self.partial.drain(..MAX_CONTENT);
        go_on
    }

    /// What is left at the end of the stream.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.partial)
    }

    /// Bytes kept.
    pub fn pending(&self) -> usize {
        self.partial.len()
    }
}

/// Appends an entry to `out`. The time has nine digits below the second, so entries sort as text.
pub(super) fn append(out: &mut Vec<u8>, now: OffsetDateTime, stream: LogStream, tag: Tag, content: &[u8]) {
    let (year, month, day) = now.to_calendar_date();
    let (hour, minute, second, nano) = now.to_hms_nano();
    let stream = match stream {
        LogStream::Stdout => "stdout",
        LogStream::Stderr => "stderr",
    };
    let tag = match tag {
        Tag::Full => 'F',
        Tag::Partial => 'P',
    };
    let month = u8::from(month);
    write!(out, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nano:09}Z {stream} {tag} ")
        .expect("a Vec grows as needed");
    out.extend_from_slice(content);
    out.push(b'\n');
}
