//! PAX extended header records.

use std::collections::BTreeMap;

use super::sparse::MAX_SEGMENTS;

/// The records before one entry that mean something to us. An empty value takes a record back.
#[derive(Default)]
pub(super) struct Records {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    /// Seconds and nanoseconds.
    pub mtime: Option<(i64, u32)>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub sparse: PaxSparse,
    any: bool,
}

/// GNU tar's records about sparse files (its manual, "Storing Sparse Files").
#[derive(Default)]
pub(super) struct PaxSparse {
    /// The file's true name and size.
    pub name: Option<Vec<u8>>,
    pub size: Option<u64>,
    /// Offsets and lengths (versions 0.0 and 0.1).
    pub map: Option<Vec<(u64, u64)>>,
    /// The map stands before the data (version 1.0).
    pub in_data: bool,
    /// An offset of version 0.0 that waits for its length.
    offset: Option<u64>,
}

impl Records {
    pub(super) fn is_empty(&self) -> bool {
        !self.any
    }

    /// Parses `LENGTH KEY=VALUE\n` and so on.
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, &'static str> {
        let mut records = Self { any: true, ..Self::default() };
        while !bytes.is_empty() {
            let (key, value, rest) = split_record(bytes).ok_or("a malformed PAX record")?;
            records.take(key, value)?;
            bytes = rest;
        }
        if records.sparse.offset.is_some() {
            return Err("a sparse map of an odd number of numbers");
        }
        Ok(records)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let bytes = || (!value.is_empty()).then(|| value.to_vec());
        let number = |what: &'static str| match value.is_empty() {
            true => Ok(None),
            false => decimal(value).map(Some).ok_or(what),
        };
        match key {
            b"path" => self.path = bytes(),
            b"linkpath" => self.link = bytes(),
            b"size" => self.size = number("a PAX size that is no number")?,
            b"uid" => self.uid = number("a PAX uid that is no number")?,
            b"gid" => self.gid = number("a PAX gid that is no number")?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(timestamp(value).ok_or("a PAX mtime that is no time")?),
            b"GNU.sparse.name" => self.sparse.name = bytes(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.size = number("a sparse file's size that is no number")?;
            }
            b"GNU.sparse.major" => self.sparse.in_data = value == b"1",
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" | b"GNU.sparse.map" => self.take_map(key, value)?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        Ok(())
    }

    /// A record of the sparse map, version 0.0 or 0.1.
    fn take_map(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let bad = "a sparse map that is no numbers";
        let map = self.sparse.map.get_or_insert_default();
        match key {
            b"GNU.sparse.offset" => {
                let offset = decimal(value).ok_or(bad)?;
                if self.sparse.offset.replace(offset).is_some() {
                    return Err(bad);
                }
            }
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or(bad)?;
                map.push((offset, decimal(value).ok_or(bad)?));
            }
            _ => {
                map.clear();
                let mut numbers = value.split(|byte| *byte == b',').filter(|number| !number.is_empty());
                while let Some(offset) = numbers.next() {
                    let length = numbers.next().and_then(decimal).ok_or(bad)?;
                    map.push((decimal(offset).ok_or(bad)?, length));
                }
            }
        }
        match map.len() > MAX_SEGMENTS {
            true => Err("a sparse map that is too long"),
            false => Ok(()),
        }
    }
}

/// The first record's key and value, and what comes after it.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then(|| (&record[..equals], &record[equals + 1..], &bytes[length..]))
}

/// An unsigned decimal number, of digits alone.
pub(super) fn decimal(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() {
        return None;
    }
    bytes.iter().try_fold(0u64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

/// `[-]SECONDS[.FRACTION]` as seconds and nanoseconds that are to be added; digits beyond nanoseconds are dropped.
fn timestamp(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(value) => (true, value),
        None => (false, value),
    };
    let dot = value.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = dot.map_or((value, &b""[..]), |dot| (&value[..dot], &value[dot + 1..]));
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let nanos =
        (0..9).fold(0, |nanos, place| nanos * 10 + fraction.get(place).map_or(0, |digit| u32::from(digit - b'0')));
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_split_by_their_lengths() {
        let records = Records::parse(b"9 path=a\n18 SCHILY.xattr.=\n30 mtime=1350244992.023960108\n11 uid=70\n");
        assert!(records.is_err(), "the second length is wrong");
        let records = Records::parse(b"9 path=a\n24 SCHILY.xattr.user.k=\n\n\n30 mtime=1350244992.023960108\n");
        assert!(records.is_err(), "the second length is short by one");
        let records = Records::parse(b"9 path=a\n26 SCHILY.xattr.user.k=\n=\n30 mtime=1350244992.023960108\n").unwrap();
        assert_eq!(records.path.as_deref(), Some(&b"a"[..]));
        assert_eq!(records.mtime, Some((1_350_244_992, 23_960_108)));
        assert_eq!(records.xattrs[&b"user.k"[..]], b"\n=");
    }

    #[test]
    fn times_before_the_epoch_count_up() {
        assert_eq!(timestamp(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(timestamp(b"-2"), Some((-2, 0)));
        assert_eq!(timestamp(b"1.1234567891"), Some((1, 123_456_789)));
        for bad in [&b""[..], b".", b"-", b"1.x", b"x", b"99999999999999999999"] {
            assert_eq!(timestamp(bad), None);
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [&b"x"[..], b"5 a=b\n", b"7 a=b\n", b"5 =b\n", b"0 a=b\n", b"18446744073709551615 a=b\n", b"6 a b\n"]
        {
            assert!(Records::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }
}
