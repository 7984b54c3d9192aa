use super::*;
use crate::devices::testing::{BUFFERS, INDIRECT, MEMORY, NEXT, WRITE, activate, memory};

#[test]
fn a_request_is_filled_with_random_bytes() {
    let mut rng = Rng::new().unwrap();
    let memory = memory();
    for features in [0, RING_FEATURES] {
        let mut driver = activate(&mut rng, &memory, features).remove(0);
        for _ in 0..200 {
            assert_eq!(driver.request(&[(BUFFERS, 64, true), (BUFFERS + 4096, 100, true)]), 164);
        }
        assert_ne!(driver.bytes(BUFFERS, 64), vec![0; 64]);
        assert_ne!(driver.bytes(BUFFERS + 4096, 100), vec![0; 100]);
        assert_eq!(driver.bytes(BUFFERS + 64, 64), vec![0; 64]);
        rng.reset();
    }
}

#[test]
fn a_long_request_is_cut() {
    let mut rng = Rng::new().unwrap();
    let memory = memory();
    let mut driver = activate(&mut rng, &memory, RING_FEATURES).remove(0);
    assert_eq!(driver.request(&[(BUFFERS, 1 << 20, true)]), MAX_BYTES as u32);
}

#[test]
fn malformed_chains_are_given_back_unused_and_the_next_is_served() {
    let mut rng = Rng::new().unwrap();
    let memory = memory();
    let mut driver = activate(&mut rng, &memory, RING_FEATURES).remove(0);
    // A loop.
    driver.descriptor(10, BUFFERS, 16, WRITE | NEXT, 11);
    driver.descriptor(11, BUFFERS, 16, WRITE | NEXT, 10);
    // A successor outside the table.
    driver.descriptor(12, BUFFERS, 16, WRITE | NEXT, 5000);
    // Outside the memory; at its very end; around the end of the address space.
    driver.descriptor(13, MEMORY, 16, WRITE, 0);
    driver.descriptor(14, MEMORY - 8, 16, WRITE, 0);
    driver.descriptor(15, u64::MAX - 8, 16, WRITE, 0);
    // Readable after writable.
    driver.descriptor(16, BUFFERS, 16, WRITE | NEXT, 17);
    driver.descriptor(17, BUFFERS, 16, 0, 0);
    // Indirect tables: of a length that is no multiple of 16, outside the memory, within another, empty.
    driver.descriptor(18, BUFFERS, 17, INDIRECT, 0);
    driver.descriptor(19, MEMORY, 32, INDIRECT, 0);
    driver.descriptor_at(BUFFERS + 0x1000, BUFFERS + 0x1000, 16, INDIRECT, 0);
    driver.descriptor(20, BUFFERS + 0x1000, 16, INDIRECT, 0);
    driver.descriptor(21, BUFFERS, 0, INDIRECT, 0);
    let heads = [10, 12, 13, 14, 15, 16, 18, 19, 20, 21];
    for head in heads {
        driver.offer(head);
    }
    driver.notify();
    for head in heads {
        assert_eq!(driver.wait_used(), (head, 0));
    }
    // Zero bytes, and only readable ones, are nothing to fill.
    assert_eq!(driver.request(&[(BUFFERS, 0, true)]), 0);
    assert_eq!(driver.request(&[(BUFFERS, 16, false)]), 0);
    assert_eq!(driver.request(&[(BUFFERS, 16, true)]), 16);
}

#[test]
fn indirect_chains_are_followed_to_their_limit() {
    let mut rng = Rng::new().unwrap();
    let memory = memory();
    let mut driver = activate(&mut rng, &memory, RING_FEATURES).remove(0);
    for (entries, expected) in [(300u16, 300), (1024, 1024), (1025, 0)] {
        let table = BUFFERS + 0x10000;
        for entry in 0..entries {
            let flags = if entry + 1 < entries { WRITE | NEXT } else { WRITE };
            driver.descriptor_at(table + 16 * u64::from(entry), BUFFERS, 1, flags, entry + 1);
        }
        driver.descriptor(3, table, 16 * u32::from(entries), INDIRECT, 0);
        driver.offer(3);
        driver.notify();
        assert_eq!(driver.wait_used(), (3, expected));
    }
}

#[test]
fn a_broken_ring_stops_the_device_until_reset() {
    let mut rng = Rng::new().unwrap();
    let memory = memory();
    let driver = activate(&mut rng, &memory, RING_FEATURES).remove(0);
    driver.set_avail(1000);
    driver.notify();
    assert!(driver.needs_reset());
    rng.reset();
    let mut driver = activate(&mut rng, &memory, RING_FEATURES).remove(0);
    assert_eq!(driver.request(&[(BUFFERS, 16, true)]), 16);
    // A head outside the table cannot even be given back.
    driver.offer(64);
    driver.notify();
    assert!(driver.needs_reset());
}

#[test]
fn a_driver_that_never_stops_sending_malformed_chains_does_not_hold_up_a_reset() {
    let mut rng = Rng::new().unwrap();
    let memory = memory();
    let mut driver = activate(&mut rng, &memory, RING_FEATURES).remove(0);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let answered = std::sync::atomic::AtomicU64::new(0);
    let order = std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|scope| {
        let refill = scope.spawn(|| {
            driver.descriptor(5, MEMORY, 16, WRITE, 0);
            let mut in_flight = 0;
            while !stop.load(order) {
                while in_flight < 64 {
                    driver.offer(5);
                    in_flight += 1;
                }
                // Each time: a device that found the ring empty waits for it.
                driver.notify();
                while driver.take_used().is_some() {
                    in_flight -= 1;
                    answered.fetch_add(1, order);
                }
            }
        });
        let begun = std::time::Instant::now();
        while answered.load(order) == 0 && begun.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let start = std::time::Instant::now();
        rng.reset();
        let took = start.elapsed();
        stop.store(true, order);
        refill.join().unwrap();
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert!(answered.load(order) > 0);
    });
}
