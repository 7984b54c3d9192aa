//! The line a host-side connection begins with.

/// Most bytes of the line, its end included.
pub(super) const MAX_LINE: usize = 32;

/// The answer when the guest refuses a connection.
pub(super) const REFUSED: &[u8] = b"REFUSED\n";
/// The answer when the guest gives none in time.
pub(super) const TIMEOUT: &[u8] = b"TIMEOUT\n";

/// What the host's side asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// A connection to this port of the guest.
    Connect(u32),
    /// One connection of the guest to this port of the host.
    Accept(u32),
}

impl Command {
    /// Reads a line without its end. `None`: it is not one of ours.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let (make, digits): (fn(u32) -> Self, _) = if let Some(digits) = line.strip_prefix(b"CONNECT ") {
            (Self::Connect, digits)
        } else {
            (Self::Accept, line.strip_prefix(b"ACCEPT ")?)
        };
        if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
        // The highest number means "any port" (VMADDR_PORT_ANY) and is none.
        (port != u32::MAX).then(|| make(port))
    }
}

/// The part of the line that has come.
#[derive(Debug, Default)]
pub(super) struct Line {
    bytes: [u8; MAX_LINE],
    length: usize,
}

/// What one more byte made of a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    More,
    Complete(Command),
    Invalid,
}

impl Line {
    /// Adds the next byte.
    pub fn push(&mut self, byte: u8) -> Progress {
        if byte == b'\n' {
            return Command::parse(&self.bytes[..self.length]).map_or(Progress::Invalid, Progress::Complete);
        }
        // One place is the line's end's.
        if self.length == MAX_LINE - 1 {
            return Progress::Invalid;
        }
        self.bytes[self.length] = byte;
        self.length += 1;
        Progress::More
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &[u8]) -> Progress {
        let mut partial = Line::default();
        for byte in line {
            match partial.push(*byte) {
                Progress::More => {}
                done => return done,
            }
        }
        Progress::More
    }

    #[test]
    fn both_commands_are_understood() {
        assert_eq!(read(b"CONNECT 1025\n"), Progress::Complete(Command::Connect(1025)));
        assert_eq!(read(b"ACCEPT 4294967294\n"), Progress::Complete(Command::Accept(u32::MAX - 1)));
        assert_eq!(read(b"ACCEPT 0"), Progress::More);
    }

    #[test]
    fn anything_else_is_refused() {
        let lines: [&[u8]; 10] = [
            b"\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT +1\n",
            b"CONNECT 1 \n",
            b"CONNECT 1\r\n",
            b"connect 1\n",
            b"CONNECT 4294967295\n",
            b"ACCEPT 4294967296\n",
            b"GET / HTTP/1.1 and so on and so on",
        ];
        for line in lines {
            assert_eq!(read(line), Progress::Invalid, "{}", String::from_utf8_lossy(line));
        }
    }
}
