//! The partition table of an image's disk (UEFI 2.10, 5 "GUID Partition Table Disk Layout"): protective MBR, header and
//! entries in front of the layers, entries and header again behind them.

/// Bytes of a sector, and of what stands in front of the layers and behind them: the 33 or 34 sectors the table needs,
/// rounded up so that each layer starts at a multiple of 4 KiB.
const SECTOR: usize = 512;
pub(super) const EDGE: u64 = 20480;
/// Entries of the table, and so the most partitions.
const ENTRIES: usize = 128;
const ENTRY: usize = 128;
const EDGE_SECTORS: u64 = EDGE / SECTOR as u64;
const TABLE_SECTORS: u64 = (ENTRIES * ENTRY / SECTOR) as u64;
/// "Linux filesystem data", 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is stored.
const LINUX_DATA: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];

/// A partition: its GUID and its size in bytes, a multiple of 4 KiB.
pub(super) struct Partition {
    pub guid: [u8; 16],
    pub bytes: u64,
}

/// What stands in front of the partitions and behind them, [`EDGE`] bytes each.
pub(super) fn edges(disk_guid: [u8; 16], partitions: &[Partition]) -> (Vec<u8>, Vec<u8>) {
    debug_assert!(partitions.len() <= ENTRIES, "the limit on layers");
    let sectors = partitions.iter().map(|partition| partition.bytes / SECTOR as u64).sum::<u64>() + 2 * EDGE_SECTORS;
    let mut table = Vec::with_capacity(ENTRIES * ENTRY);
    let mut first = EDGE_SECTORS;
    for (index, partition) in partitions.iter().enumerate() {
        let next = first + partition.bytes / SECTOR as u64;
        let mut entry = [0; ENTRY];
        entry[0..16].copy_from_slice(&LINUX_DATA);
        entry[16..32].copy_from_slice(&partition.guid);
        // Layers often come twice (an empty one), GUIDs must not.
        entry[16] ^= index as u8;
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&(next - 1).to_le_bytes());
        // Attribute 60, read-only, as systemd's Discoverable Partitions Specification has it.
        entry[48..56].copy_from_slice(&(1u64 << 60).to_le_bytes());
        for (unit, place) in format!("layer {}", index + 1).encode_utf16().zip(entry[56..].chunks_exact_mut(2)) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
        table.extend_from_slice(&entry);
        first = next;
    }
    table.resize(ENTRIES * ENTRY, 0);
    let header = |own: u64, other: u64, table_sector: u64| {
        let mut header = [0; SECTOR];
        header[0..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        header[24..32].copy_from_slice(&own.to_le_bytes());
        header[32..40].copy_from_slice(&other.to_le_bytes());
        header[40..48].copy_from_slice(&EDGE_SECTORS.to_le_bytes());
        header[48..56].copy_from_slice(&(sectors - EDGE_SECTORS - 1).to_le_bytes());
        header[56..72].copy_from_slice(&disk_guid);
        header[72..80].copy_from_slice(&table_sector.to_le_bytes());
        header[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        header[84..88].copy_from_slice(&(ENTRY as u32).to_le_bytes());
        header[88..92].copy_from_slice(&crc32fast::hash(&table).to_le_bytes());
        let checksum = crc32fast::hash(&header[..92]);
        header[16..20].copy_from_slice(&checksum.to_le_bytes());
        header
    };
    let mut head = protective_mbr(sectors).to_vec();
    head.extend_from_slice(&header(1, sectors - 1, 2));
    head.extend_from_slice(&table);
    head.resize(EDGE as usize, 0);
    let mut tail = vec![0; EDGE as usize - table.len() - SECTOR];
    tail.extend_from_slice(&table);
    tail.extend_from_slice(&header(sectors - 1, 1, sectors - 1 - TABLE_SECTORS));
    (head, tail)
}

/// A master boot record that says to older programs that the whole disk is taken.
fn protective_mbr(sectors: u64) -> [u8; SECTOR] {
    let mut mbr = [0; SECTOR];
    let partition = &mut mbr[446..462];
    partition[1..4].copy_from_slice(&[0x00, 0x02, 0x00]);
    partition[4] = 0xee;
    partition[5..8].copy_from_slice(&[0xff, 0xff, 0xff]);
    partition[8..12].copy_from_slice(&1u32.to_le_bytes());
    let size = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    partition[12..16].copy_from_slice(&size.to_le_bytes());
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_headers_say_the_same_and_their_checksums_hold() {
        let partitions = [4096, 8192].map(|bytes| Partition { guid: [7; 16], bytes });
        let (head, tail) = edges([9; 16], &partitions);
        assert_eq!((head.len() as u64, tail.len() as u64), (EDGE, EDGE));
        let front = &head[SECTOR..2 * SECTOR];
        let back = &tail[tail.len() - SECTOR..];
        for header in [front, back] {
            let mut blank = header[..92].to_vec();
            blank[16..20].fill(0);
            assert_eq!(header[16..20], crc32fast::hash(&blank).to_le_bytes());
        }
        assert_eq!(front[24..32], back[32..40]);
        assert_eq!(front[40..72], back[40..72]);
        let table = &head[2 * SECTOR..2 * SECTOR + ENTRIES * ENTRY];
        assert_eq!(front[88..92], crc32fast::hash(table).to_le_bytes());
        assert_eq!(table, &tail[tail.len() - SECTOR - table.len()..tail.len() - SECTOR]);
        assert_ne!(table[16..32], table[ENTRY + 16..ENTRY + 32], "equal layers have GUIDs of their own");
    }
}
