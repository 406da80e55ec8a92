//! The ring between two ends of one process, and with somebody who writes nonsense at the other.

use super::*;

fn ring() -> (Writer, Reader) {
    let (writer, file) = Writer::create(0).expect("memory");
    let reader = Reader::open(&file).expect("the same memory");
    (writer, reader)
}

fn take(reader: &mut Reader) -> Option<(Vec<u8>, Vec<u8>)> {
    let record = reader.next().expect("an honest writer")?;
    let head = record.head().to_vec();
    let mut payload = vec![0; record.payload];
    record.take(&mut payload);
    Some((head, payload))
}

#[test]
fn records_come_out_as_they_went_in_over_the_end_of_the_ring_too() {
    let (mut writer, mut reader) = ring();
    for round in 0..1000_usize {
        let payload: Vec<u8> = (0..round * 97 % 9000).map(|at| (at * 7 + round) as u8).collect();
        let head = vec![round as u8; 12 + round % 40];
        assert_eq!(writer.push(&head, &payload), Ok(true));
        assert_eq!(take(&mut reader), Some((head, payload)));
    }
    assert_eq!(take(&mut reader), None);
}

#[test]
fn a_full_ring_takes_no_more_until_something_is_read_and_then_the_writer_is_told() {
    let (mut writer, mut reader) = ring();
    let payload = vec![1; MAX_PAYLOAD];
    let mut pushed = 0;
    while writer.push(&[2; 28], &payload).expect("an honest reader") {
        pushed += 1;
    }
    assert_eq!(pushed, 3, "of 64 KiB each in 256 KiB");
    assert!(take(&mut reader).is_some());
    assert!(reader.must_wake(), "nobody would tell the writer");
    assert!(!reader.must_wake(), "once is enough");
    assert_eq!(writer.push(&[2; 28], &payload), Ok(true));
}

#[test]
fn who_writes_to_a_sleeper_wakes_it_once() {
    let (mut writer, mut reader) = ring();
    assert!(!writer.must_wake());
    assert!(!reader.set_asleep(true), "there is nothing");
    assert_eq!(writer.push(&[1; 12], &[]), Ok(true));
    assert!(writer.must_wake() && !writer.must_wake());
    assert!(reader.set_asleep(true), "it would sleep over a record");
    assert!(take(&mut reader).is_some());
}

#[test]
fn nonsense_is_seen_before_it_is_used() {
    for (tail, lengths) in [
        (u64::MAX, [0, 0]),
        (1, [0, 0]),
        (1 << 40, [12, 0]),
        (64, [65, 0]),
        (64, [12, 1 << 20]),
        (64, [12, 60]),
        (64, [u32::MAX, u32::MAX]),
    ] {
        let (writer, mut reader) = ring();
        let bytes: Vec<u8> = lengths.iter().flat_map(|length: &u32| length.to_ne_bytes()).collect();
        writer.ring.copy_in(0, &bytes);
        writer.ring.shared().tail.0.store(tail, Ordering::Release);
        assert!(reader.next().is_err(), "tail {tail}, lengths {lengths:?}");
    }
    for head in [1 << 40, u64::MAX] {
        let (mut writer, reader) = ring();
        reader.ring.shared().head.0.store(head, Ordering::Release);
        let payload = vec![0; MAX_PAYLOAD];
        let broken = (0..10).any(|_| writer.push(&[0; 12], &payload) == Err(Broken));
        assert!(broken, "a reader at {head} was believed");
    }
}

#[test]
fn a_file_that_could_be_cut_short_or_has_an_odd_size_is_refused() {
    let file = rustix::fs::memfd_create("odd", MemfdFlags::ALLOW_SEALING).expect("a file");
    rustix::fs::ftruncate(&file, (DATA + (256 << 10)) as u64).expect("its size");
    assert!(Reader::open(&file).is_err(), "its owner could take the memory away under us");
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).expect("sealed");
    assert!(Reader::open(&file).is_ok());
    rustix::fs::ftruncate(&file, (DATA + (257 << 10)) as u64).expect("its size");
    assert!(Reader::open(&file).is_err());
}
