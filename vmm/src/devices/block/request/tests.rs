use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::block::{Block, Segment};
use crate::devices::queue::RING_FEATURES;
use crate::devices::testing::{BUFFERS, Driver, activate, memory};
use crate::virtio::VirtioDevice;

const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x800;

/// A disk of 3 and 5 sectors whose every byte tells its sector, and its files.
fn block(readonly: bool) -> (Block, [File; 2]) {
    let files = [(1u64, 0u8, 3u8), (0, 3, 5)].map(|(offset, first, sectors)| {
        let file = tempfile::tempfile().unwrap();
        for sector in 0..sectors {
            file.write_all_at(&[first + sector + 1; 512], (offset + u64::from(sector)) * 512).unwrap();
        }
        // What lies behind is not on the disk.
        file.write_all_at(&[0xee; 512], (offset + u64::from(sectors)) * 512).unwrap();
        (file, offset * 512, u64::from(sectors) * 512)
    });
    let segments = files.iter().map(|(file, offset, length)| Segment {
        file: file.try_clone().unwrap(),
        offset: *offset,
        length: *length,
    });
    let block = Block::new(DiskId::parse("img-1").unwrap(), readonly, segments.collect()).unwrap();
    (block, files.map(|(file, _, _)| file))
}

fn start(block: &mut Block) -> Driver {
    activate(block, &memory(), RING_FEATURES).remove(0)
}

fn header(driver: &Driver, kind: u32, sector: u64) {
    driver.memory.write_obj(kind, GuestAddress(BUFFERS)).unwrap();
    driver.memory.write_obj(sector, GuestAddress(BUFFERS + 8)).unwrap();
    driver.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
}

fn status(driver: &Driver) -> u32 {
    u32::from(driver.bytes(STATUS, 1)[0])
}

/// Sends a request of `length` bytes of data and returns its status and the used length.
fn request(driver: &mut Driver, kind: u32, sector: u64, length: u32, writable: bool) -> (u32, u32) {
    header(driver, kind, sector);
    let used = match length {
        0 => driver.request(&[(BUFFERS, 16, false), (STATUS, 1, true)]),
        _ => driver.request(&[(BUFFERS, 16, false), (DATA, length, writable), (STATUS, 1, true)]),
    };
    (status(driver), used)
}

#[test]
fn a_read_crosses_from_segment_to_segment() {
    let (mut block, _files) = block(true);
    let mut driver = start(&mut block);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 0, 8 * 512, true), (VIRTIO_BLK_S_OK, 8 * 512 + 1));
    let expected: Vec<u8> = (1..=8).flat_map(|sector| [sector; 512]).collect();
    assert_eq!(driver.bytes(DATA, 8 * 512), expected);
    // Scattered over odd buffers, the header and the status too.
    header(&driver, VIRTIO_BLK_T_IN, 2);
    let buffers = [
        (BUFFERS, 3, false),
        (BUFFERS + 3, 13, false),
        (DATA, 1, true),
        (DATA + 0x1000, 511, true),
        (DATA + 0x2000, 512, true),
        (STATUS, 1, true),
    ];
    assert_eq!(driver.request(&buffers), 1025);
    assert_eq!(status(&driver), VIRTIO_BLK_S_OK);
    assert_eq!(driver.bytes(DATA + 0x1000, 511), [3; 511]);
    assert_eq!(driver.bytes(DATA + 0x2000, 512), [4; 512]);
}

#[test]
fn a_write_reaches_both_files_and_nothing_beside_it() {
    let (mut block, files) = block(false);
    let mut driver = start(&mut block);
    driver.memory.write_slice(&[0xaa; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_OUT, 2, 1024, false), (VIRTIO_BLK_S_OK, 1));
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, 0, false), (VIRTIO_BLK_S_OK, 1));
    let sectors = |file: &File| {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes.chunks(512).map(|sector| sector[0]).collect::<Vec<_>>()
    };
    assert_eq!(sectors(&files[0]), [0, 1, 2, 0xaa, 0xee]);
    assert_eq!(sectors(&files[1]), [0xaa, 5, 6, 7, 8, 0xee]);
}

#[test]
fn the_serial_is_the_disk_id() {
    let (mut block, _files) = block(true);
    let mut driver = start(&mut block);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_GET_ID, 0, 20, true), (VIRTIO_BLK_S_OK, 21));
    assert_eq!(driver.bytes(DATA, 20), *b"img-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn nothing_outside_the_disk_is_read_or_written() {
    let (mut block, _files) = block(false);
    let mut driver = start(&mut block);
    let failed = (VIRTIO_BLK_S_IOERR, 1);
    for (sector, length) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100), (0, 513), (0, 0)] {
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, sector, length, true), failed, "{sector} {length}");
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_OUT, sector, length, false), failed, "{sector} {length}");
    }
    // Data in the wrong direction is no data.
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 0, 512, false), failed);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_OUT, 0, 512, true), failed);
    assert_eq!(request(&mut driver, 77, 0, 512, true), (VIRTIO_BLK_S_UNSUPP, 1));
}

#[test]
fn a_request_without_header_or_status_does_no_harm() {
    let (mut block, _files) = block(false);
    let mut driver = start(&mut block);
    header(&driver, VIRTIO_BLK_T_IN, 0);
    assert_eq!(driver.request(&[(BUFFERS, 15, false), (STATUS, 1, true)]), 1);
    assert_eq!(status(&driver), VIRTIO_BLK_S_IOERR);
    assert_eq!(driver.request(&[(STATUS, 1, true)]), 1);
    assert_eq!(driver.request(&[(BUFFERS, 16, false)]), 0);
    assert_eq!(driver.request(&[(BUFFERS, 16, false), (STATUS, 0, true)]), 0);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 0, 512, true), (VIRTIO_BLK_S_OK, 513));
}

#[test]
fn a_read_only_disk_is_never_written() {
    let (mut block, files) = block(true);
    let mut driver = start(&mut block);
    let before: Vec<_> = files.iter().map(|file| file.metadata().unwrap().modified().unwrap()).collect();
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(request(&mut driver, kind, 0, 512, false), (VIRTIO_BLK_S_IOERR, 1));
    }
    let after: Vec<_> = files.iter().map(|file| file.metadata().unwrap().modified().unwrap()).collect();
    assert_eq!(before, after);
}

#[test]
fn discard_and_write_zeroes_check_all_ranges_before_they_act() {
    let (mut block, files) = block(false);
    let mut driver = start(&mut block);
    let range = |driver: &Driver, index: u64, sector: u64, sectors: u32, flags: u32| {
        let at = DATA + 16 * index;
        driver.memory.write_obj(sector, GuestAddress(at)).unwrap();
        driver.memory.write_obj(sectors, GuestAddress(at + 8)).unwrap();
        driver.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    };
    let first = || {
        let mut byte = [0];
        files[0].read_exact_at(&mut byte, 512).unwrap();
        byte[0]
    };
    range(&driver, 0, 0, 1, 0);
    range(&driver, 1, 8, 1, 0);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, 32, false).0, VIRTIO_BLK_S_IOERR);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, 24, false).0, VIRTIO_BLK_S_IOERR);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, 17 * 16, false).0, VIRTIO_BLK_S_IOERR);
    range(&driver, 1, 7, 1, 2);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, 32, false).0, VIRTIO_BLK_S_UNSUPP);
    range(&driver, 1, 7, 1, 1);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_DISCARD, 0, 32, false).0, VIRTIO_BLK_S_UNSUPP);
    assert_eq!(first(), 1);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, 32, false).0, VIRTIO_BLK_S_OK);
    assert_eq!(first(), 0);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_DISCARD, 0, 16, false).0, VIRTIO_BLK_S_OK);
}

#[test]
fn a_file_that_became_shorter_is_an_error_for_the_guest() {
    let (mut block, files) = block(true);
    let mut driver = start(&mut block);
    files[1].set_len(512).unwrap();
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 3, 512, true).0, VIRTIO_BLK_S_OK);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 4, 512, true).0, VIRTIO_BLK_S_IOERR);
}

#[test]
fn the_configuration_space_tells_capacity_and_limits() {
    let (block, _files) = block(false);
    let mut bytes = [0; 64];
    block.read_config(0, &mut bytes);
    assert_eq!(bytes[..8], 8u64.to_le_bytes());
    assert_eq!((bytes[12], bytes[20..24].to_vec(), bytes[56]), (254, 512u32.to_le_bytes().to_vec(), 1));
    block.read_config(56, &mut bytes);
    assert_eq!((bytes[0], bytes[1]), (1, 0));
    block.read_config(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 64]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Writes and reads anywhere, in pieces of any length, behave as one array of bytes does.
    #[test]
    fn the_disk_is_one_array_of_bytes(
        operations in prop::collection::vec((any::<bool>(), 0u64..8, 1u64..8, 1u32..600, any::<u8>()), 1..20),
    ) {
        let (mut block, _files) = block(false);
        let mut driver = start(&mut block);
        let mut model: Vec<u8> = (1..=8).flat_map(|sector| [sector; 512]).collect();
        for (write, sector, sectors, piece, value) in operations {
            let length = (sectors * 512) as u32;
            let kind = if write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
            header(&driver, kind, sector);
            driver.memory.write_slice(&vec![value; length as usize], GuestAddress(DATA)).unwrap();
            let mut buffers = vec![(BUFFERS, 16, false)];
            for start in (0..length).step_by(piece as usize) {
                buffers.push((DATA + u64::from(start), piece.min(length - start), !write));
                if buffers.len() == 200 {
                    buffers.push((DATA + u64::from(start + piece), length.saturating_sub(start + piece), !write));
                    break;
                }
            }
            buffers.push((STATUS, 1, true));
            driver.request(&buffers);
            let range = sector as usize * 512..(sector + sectors) as usize * 512;
            let expected = if range.end <= model.len() { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR };
            prop_assert_eq!(status(&driver), expected);
            if expected == VIRTIO_BLK_S_OK {
                if write {
                    model[range].fill(value);
                } else {
                    prop_assert_eq!(driver.bytes(DATA, length as usize), &model[range]);
                }
            }
        }
    }
}
