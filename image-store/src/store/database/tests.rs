//! Loss of power at any write of the database.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use redb::StorageBackend;

use super::*;

/// A disk that is cut off at a write: of those since the last sync some are lost, and the last one is torn.
#[derive(Debug, Default)]
struct Disk {
    now: Vec<u8>,
    synced: Vec<u8>,
    /// Since then.
    writes: Vec<(usize, Vec<u8>)>,
    /// Writes until it is cut off, and then what is on it.
    left: usize,
    cut: Option<Vec<u8>>,
    seed: u64,
}

impl Disk {
    fn chance(&mut self) -> usize {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) as usize
    }

    fn cut_off(&mut self) {
        let mut disk = self.synced.clone();
        disk.resize(self.now.len(), 0);
        let writes = std::mem::take(&mut self.writes);
        for (index, (offset, data)) in writes.iter().enumerate() {
            let last = index + 1 == writes.len();
            let length = if last { self.chance() % (data.len() + 1) } else { data.len() };
            if last || self.chance().is_multiple_of(2) {
                disk[*offset..offset + length].copy_from_slice(&data[..length]);
            }
        }
        (self.writes, self.cut) = (writes, Some(disk));
    }
}

#[derive(Clone, Debug)]
struct Backend(Arc<Mutex<Disk>>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (disk, offset) = (self.0.lock(), offset as usize);
        let bytes = disk.now.get(offset..offset + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut disk = self.0.lock();
        disk.now.resize(length as usize, 0);
        disk.writes.retain(|(offset, data)| (offset + data.len()) as u64 <= length);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.0.lock();
        disk.synced = disk.now.clone();
        disk.writes.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (mut disk, offset) = (self.0.lock(), offset as usize);
        disk.now[offset..offset + data.len()].copy_from_slice(data);
        disk.writes.push((offset, data.to_vec()));
        if disk.cut.is_none() {
            match disk.left {
                0 => disk.cut_off(),
                _ => disk.left -= 1,
            }
        }
        Ok(())
    }
}

fn open(backend: Backend) -> ImageDatabase {
    let database = Database::builder().create_with_backend(backend).expect("opened");
    ImageDatabase::prepare(database).expect("prepared")
}

fn id(number: usize) -> ImageId {
    Digest::of(&number.to_le_bytes())
}

#[test]
fn a_database_that_loses_power_has_what_was_answered() {
    let mut cuts = 0;
    for seed in 0..150 {
        let disk = Arc::new(Mutex::new(Disk { left: usize::MAX, seed, ..Disk::default() }));
        let database = open(Backend(disk.clone()));
        // Some records are larger than a page.
        let labels = |number: usize| BTreeMap::from([("l".to_owned(), "x".repeat(number % 3 * 5000))]);
        let (mut model, mut former) = (BTreeSet::new(), BTreeSet::new());
        disk.lock().left = seed as usize * 2 % 97;
        for operation in 0..30 {
            let number = disk.lock().chance() % 6;
            former = model.clone();
            if model.remove(&id(number)) {
                database.remove(&[id(number)]).expect("removed");
            } else {
                let config = StoredConfig { labels: labels(number), ..StoredConfig::default() };
                let record = Record { layers: vec![id(operation).to_string()], size: 1, config, verity: None };
                database.add(&id(number), &record, &[format!("a.example/b:{number}")]).expect("added");
                model.insert(id(number));
            }
            if disk.lock().cut.is_some() {
                break;
            }
        }
        let Some(now) = disk.lock().cut.take() else { continue };
        cuts += 1;
        let again = open(Backend(Arc::new(Mutex::new(Disk { now, left: usize::MAX, ..Disk::default() }))));
        let contents = again.read().expect("read");
        let found: BTreeSet<ImageId> = contents.images.keys().cloned().collect();
        assert!(found == former || found == model, "seed {seed}: {found:?} is neither {former:?} nor {model:?}");
        assert_eq!(contents.names.into_values().collect::<BTreeSet<_>>(), found);
    }
    assert!(cuts > 100, "only {cuts} cuts");
}
