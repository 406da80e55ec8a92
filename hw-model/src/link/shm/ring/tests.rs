//! The ring between two ends of one process, and with somebody who writes nonsense at the other.

use super::*;
use rustix::event::{EventfdFlags, eventfd};

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an event")
}

fn ring() -> (Writer, Reader) {
    let (writer, file) = Writer::create(0, bell()).expect("memory");
    let reader = Reader::open(&file, bell()).expect("the same memory");
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
    let (writer, mut reader) = ring();
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
    let (writer, mut reader) = ring();
    let payload = vec![1; MAX_PAYLOAD];
    let mut pushed = 0;
    while writer.push(&[2; 28], &payload).expect("an honest reader") {
        pushed += 1;
    }
    assert_eq!(pushed, 3, "of 64 KiB each in 256 KiB");
    assert!(take(&mut reader).is_some());
    assert!(reader.wake_writer(), "nobody would tell the writer");
    assert!(!reader.wake_writer(), "once is enough");
    assert_eq!(writer.push(&[2; 28], &payload), Ok(true));
}

#[test]
fn a_payload_that_is_left_keeps_its_place_and_those_behind_it_until_it_is_done_with() {
    let (writer, mut reader) = ring();
    let mut pushed = 0_u8;
    while writer.push(&[2; 28], &[pushed; 60_000]).expect("an honest reader") {
        pushed += 1;
    }
    let leave = |reader: &mut Reader| {
        let mut record = reader.next().expect("an honest writer").expect("a record");
        record.leave().expect("it lies in one piece")
    };
    let (first, second) = (leave(&mut reader), leave(&mut reader));
    drop(second);
    assert_eq!(writer.push(&[2; 28], &[9; 60_000]), Ok(false), "it would be written over the first");
    let copy = first.clone();
    assert_eq!(&copy[..], &[0; 60_000][..]);
    let mut part = [1; 8];
    first.outside().expect("it was left").part(59_992..60_000).copy_out(&mut part);
    assert_eq!(part, [0; 8]);
    drop(first);
    assert_eq!(writer.push(&[2; 28], &[9; 60_000]), Ok(true), "both are done with");
    let rest: Vec<u8> =
        std::iter::from_fn(|| take(&mut reader)).map(|(_, payload)| payload[59_999]).collect();
    assert_eq!(rest, (2..pushed).chain([9]).collect::<Vec<_>>());
}

#[test]
fn a_writer_that_waits_is_woken_by_what_was_left() {
    let bell = bell();
    let ours = bell.try_clone().expect("an event");
    let (writer, file) = Writer::create(0, self::bell()).expect("memory");
    let mut reader = Reader::open(&file, ours).expect("the same memory");
    while writer.push(&[2; 28], &[1; 60_000]).expect("an honest reader") {}
    let left = reader.next().expect("an honest writer").expect("a record").leave();
    assert!(rustix::io::read(&bell, &mut [0; 8]).is_err(), "there is no room yet");
    drop(left.expect("it lies in one piece"));
    assert!(rustix::io::read(&bell, &mut [0; 8]).is_ok(), "the writer would sleep for ever");
}

#[test]
fn what_was_written_in_place_comes_in_its_turn_and_what_was_not_sent_is_passed_over() {
    let (writer, mut reader) = ring();
    let room = |len| writer.room(len).expect("an honest reader").expect("the ring is empty");
    let (mut first, second, mut third) = (room(5000), room(70), room(300));
    first.outside().expect("in the ring").copy_in(&[1; 5000]);
    third.outside().expect("in the ring").copy_in(&[3; 300]);
    assert_eq!(writer.push(&[4; 12], &[4; 4]), Ok(true));
    assert!(third.send(&[3; 28]));
    drop(third);
    assert_eq!(take(&mut reader), None, "what is before it has not been sent");
    assert!(first.send(&[1; 44]));
    assert_eq!(take(&mut reader), Some((vec![1; 44], vec![1; 5000])));
    assert!(!reader.set_asleep(true), "it is not seen behind one that is still written");
    drop(second);
    assert!(!writer.must_wake(), "the reader was woken when it could be seen");
    assert_eq!(take(&mut reader), Some((vec![3; 28], vec![3; 300])));
    assert_eq!(take(&mut reader), Some((vec![4; 12], vec![4; 4])));
    assert_eq!(take(&mut reader), None);
}

#[test]
fn room_is_in_one_piece_and_there_is_none_in_a_full_ring() {
    let (writer, mut reader) = ring();
    for round in 0..100_u8 {
        let len = 20_000 + 400 * usize::from(round);
        let mut payload = writer.room(len).expect("an honest reader").expect("the ring is empty");
        payload.outside().expect("in the ring").copy_in(&vec![round; len]);
        assert!(payload.send(&[round; 12]));
        drop(payload);
        let mut record = reader.next().expect("an honest writer").expect("a record");
        let left = record.leave().expect("it would be copied twice");
        assert_eq!(&left.clone()[..], &vec![round; len][..]);
    }
    let held: Vec<_> = std::iter::from_fn(|| writer.room(60_000).expect("an honest reader")).collect();
    assert!((3..=4).contains(&held.len()), "{} of 60,000 bytes in 256 KiB", held.len());
}

#[test]
fn who_writes_to_a_sleeper_wakes_it_once() {
    let (writer, mut reader) = ring();
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
        writer.0.ring.copy_in(0, &bytes);
        writer.0.ring.shared().tail.0.store(tail, Ordering::Release);
        assert!(reader.next().is_err(), "tail {tail}, lengths {lengths:?}");
    }
    for head in [1 << 40, u64::MAX] {
        let (writer, reader) = ring();
        reader.reading.ring.shared().head.0.store(head, Ordering::Release);
        let payload = vec![0; MAX_PAYLOAD];
        let broken = (0..10).any(|_| writer.push(&[0; 12], &payload) == Err(Broken));
        assert!(broken, "a reader at {head} was believed");
    }
}

#[test]
fn a_file_that_could_be_cut_short_or_has_an_odd_size_is_refused() {
    let file = rustix::fs::memfd_create("odd", MemfdFlags::ALLOW_SEALING).expect("a file");
    rustix::fs::ftruncate(&file, (DATA + (256 << 10)) as u64).expect("its size");
    assert!(Reader::open(&file, bell()).is_err(), "its owner could take the memory away under us");
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).expect("sealed");
    assert!(Reader::open(&file, bell()).is_ok());
    rustix::fs::ftruncate(&file, (DATA + (257 << 10)) as u64).expect("its size");
    assert!(Reader::open(&file, bell()).is_err());
}
