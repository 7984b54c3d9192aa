use std::io::{Seek, SeekFrom, Write};

use proptest::prelude::*;

use super::*;

/// A disk of segments of `layout` ((offset, length) in sectors) in files that are exactly long enough.
fn disk(layout: &[(u64, u64)]) -> Disk {
    let segments = layout.iter().map(|(offset, length)| {
        let file = tempfile::tempfile().unwrap();
        file.set_len((offset + length) * SECTOR).unwrap();
        Segment { file, offset: offset * SECTOR, length: length * SECTOR }
    });
    Disk::new(segments.collect()).unwrap()
}

fn refused(segments: Vec<(u64, u64, u64)>) -> BlockError {
    let segments = segments.into_iter().map(|(size, offset, length)| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        Segment { file, offset, length }
    });
    Disk::new(segments.collect()).unwrap_err()
}

#[test]
fn segments_that_cannot_be_a_disk_are_refused() {
    assert!(matches!(refused(vec![]), BlockError::NoSegment));
    assert!(matches!(refused(vec![(4096, 0, 0)]), BlockError::Unaligned { index: 0, .. }));
    assert!(matches!(refused(vec![(4096, 0, 512), (4096, 1, 512)]), BlockError::Unaligned { index: 1, .. }));
    assert!(matches!(refused(vec![(4096, 512, 513)]), BlockError::Unaligned { .. }));
    assert!(matches!(refused(vec![(4095, 0, 4096)]), BlockError::FileTooShort { size: 4095, .. }));
    assert!(matches!(refused(vec![(4096, 512, 4096)]), BlockError::FileTooShort { .. }));
    assert!(matches!(refused(vec![(4096, u64::MAX - 511, 512)]), BlockError::FileTooShort { .. }));
}

#[test]
fn a_pipe_is_no_segment() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let file = File::from(std::os::fd::OwnedFd::from(reader));
    let error = Disk::new(vec![Segment { file, offset: 0, length: 512 }]).unwrap_err();
    assert!(matches!(error, BlockError::Unreadable { index: 0, .. }));
}

#[test]
fn zeroes_and_discards_stay_within_their_segment() {
    let disk = disk(&[(1, 4), (2, 4)]);
    for Segment { file, .. } in &disk.segments {
        let (mut file, length) = (file, file.metadata().unwrap().len());
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&vec![7; length as usize]).unwrap();
    }
    disk.write_zeroes(3 * SECTOR, 2 * SECTOR, false).unwrap();
    disk.write_zeroes(6 * SECTOR, SECTOR, true).unwrap();
    disk.discard(0, SECTOR).unwrap();
    write_zeroes_plainly(&disk.segments[0].file, 2 * SECTOR, SECTOR).unwrap();
    disk.flush().unwrap();
    let sectors = |file: &File| {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
            .chunks(512)
            .map(|sector| sector.iter().map(|byte| u32::from(*byte)).sum::<u32>() / 512)
            .collect::<Vec<_>>()
    };
    assert_eq!(sectors(&disk.segments[0].file), [7, 0, 0, 7, 0]);
    assert_eq!(sectors(&disk.segments[1].file), [7, 7, 0, 7, 0, 7]);
    assert!(disk.write_zeroes(7 * SECTOR, 2 * SECTOR, false).is_err());
}

proptest! {
    /// The parts of any range, put together, are what a sector-by-sector walk through the segments gives.
    #[test]
    fn parts_cover_a_range_exactly(
        layout in prop::collection::vec((0u64..5, 1u64..6), 1..6),
        start in 0u64..40,
        length in 0u64..40,
    ) {
        let disk = disk(&layout);
        let mut flat = Vec::new();
        for (index, (offset, length)) in layout.iter().enumerate() {
            flat.extend((*offset..offset + length).map(|sector| (index, sector)));
        }
        prop_assert_eq!(disk.length(), flat.len() as u64 * SECTOR);
        let inside = start + length <= flat.len() as u64;
        prop_assert_eq!(disk.contains(start * SECTOR, length * SECTOR), inside);
        let (mut walked, mut position, end) = (Vec::new(), start * SECTOR, (start + length) * SECTOR);
        while position < end {
            let Some(part) = disk.part(position, end - position) else { break };
            prop_assert!(part.length > 0 && part.length <= end - position && part.position.is_multiple_of(SECTOR));
            let first = part.position / SECTOR;
            walked.extend((first..first + part.length / SECTOR).map(|sector| (part.segment, sector)));
            position += part.length;
        }
        let expected: Vec<_> = flat.into_iter().skip(start as usize).take(length as usize).collect();
        prop_assert_eq!(walked, expected);
        prop_assert_eq!(disk.part(u64::MAX, 1), None);
        prop_assert!(!disk.contains(u64::MAX, 1));
    }
}
