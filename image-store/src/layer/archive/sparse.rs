//! Maps of sparse files.

use tar::GnuSparseHeader;

use super::pax::decimal;

/// Most segments a sparse file may have.
pub(super) const MAX_SEGMENTS: usize = 1 << 18;

/// Which parts of a file are stored: offsets and lengths, checked to be in order, apart, and within the file.
pub(super) struct SparseMap {
    segments: Vec<(u64, u64)>,
    /// The first segment that does not end before the position last asked for.
    next: usize,
}

/// A stretch of a sparse file that is either stored or a hole.
pub(super) struct Run {
    pub hole: bool,
    /// Above 0.
    pub length: u64,
}

impl SparseMap {
    /// The map of a file of `size` bytes of which `stored` are in the stream.
    pub(super) fn new(mut segments: Vec<(u64, u64)>, size: u64, stored: u64) -> Result<Self, &'static str> {
        segments.retain(|(_, length)| *length > 0);
        let (mut end, mut total) = (0u64, 0u64);
        for (offset, length) in &segments {
            if *offset < end {
                return Err("a sparse map that is not in order");
            }
            end = offset.checked_add(*length).ok_or("a sparse map beyond all bounds")?;
            // Cannot overflow: the segments are apart and end within a u64.
            total += length;
        }
        if end > size {
            return Err("a sparse map that goes beyond its file");
        }
        if total != stored {
            return Err("a sparse map that does not fit the data stored");
        }
        Ok(Self { segments, next: 0 })
    }

    /// The run at `position`, which is below `size` and never goes back.
    pub(super) fn run_at(&mut self, position: u64, size: u64) -> Run {
        while self.segments.get(self.next).is_some_and(|(offset, length)| offset + length <= position) {
            self.next += 1;
        }
        match self.segments.get(self.next) {
            Some((offset, length)) if *offset <= position => Run { hole: false, length: offset + length - position },
            Some((offset, _)) => Run { hole: true, length: offset - position },
            None => Run { hole: true, length: size - position },
        }
    }
}

/// Adds the segments of a GNU header, which an empty one ends.
pub(super) fn push_gnu(map: &mut Vec<(u64, u64)>, segments: &[GnuSparseHeader]) -> Result<(), ()> {
    for segment in segments.iter().take_while(|segment| !segment.is_empty()) {
        map.push((segment.offset().map_err(drop)?, segment.length().map_err(drop)?));
    }
    Ok(())
}

/// Parses the map that stands before the data of a PAX 1.0 sparse file: the number of segments, then for each its offset and
/// its length, all decimal and ended by a newline.
#[derive(Default)]
pub(super) struct MapInData {
    digits: Vec<u8>,
    count: Option<usize>,
    numbers: Vec<u64>,
}

impl MapInData {
    /// Takes a block; gives the map when it is whole. What follows it in its block is padding.
    pub(super) fn feed(&mut self, block: &[u8]) -> Result<Option<Vec<(u64, u64)>>, &'static str> {
        for byte in block {
            if *byte != b'\n' {
                if self.digits.len() == 20 {
                    return Err("a sparse map that is no numbers");
                }
                self.digits.push(*byte);
                continue;
            }
            let number = decimal(&self.digits).ok_or("a sparse map that is no numbers")?;
            self.digits.clear();
            match self.count {
                None => {
                    let count = usize::try_from(number).ok().filter(|count| *count <= MAX_SEGMENTS);
                    self.count = Some(count.ok_or("a sparse map that is too long")?);
                }
                Some(_) => self.numbers.push(number),
            }
            if self.count.is_some_and(|count| self.numbers.len() == 2 * count) {
                return Ok(Some(self.numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_cannot_be_are_refused() {
        assert!(SparseMap::new(vec![(0, 10), (20, 5)], 30, 15).is_ok());
        assert!(SparseMap::new(vec![(0, 10), (5, 5)], 30, 15).is_err(), "overlap");
        assert!(SparseMap::new(vec![(20, 5), (0, 10)], 30, 15).is_err(), "order");
        assert!(SparseMap::new(vec![(0, 10), (20, 5)], 24, 15).is_err(), "size");
        assert!(SparseMap::new(vec![(0, 10), (20, 5)], 30, 14).is_err(), "stored");
        assert!(SparseMap::new(vec![(u64::MAX, 2)], u64::MAX, 2).is_err(), "overflow");
    }

    #[test]
    fn a_map_in_the_data_may_cross_blocks() {
        let mut parser = MapInData::default();
        assert_eq!(parser.feed(b"2\n0\n1"), Ok(None));
        assert_eq!(parser.feed(b"0\n512\n3\n\0\0\0"), Ok(Some(vec![(0, 10), (512, 3)])));
        assert!(MapInData::default().feed(b"1\nx\n").is_err());
        assert!(MapInData::default().feed(b"999999999999\n").is_err());
    }
}
