//! The oracle alone: it says yes to what may be, and no to what may not.

use anypage::sim::memory::{Memory, Piece};
use hw_model::addr::{VirtAddr, VirtRange};
use odp::space::sim::Protection;

const SOURCE: VirtAddr = VirtAddr(0x1_0000);
const TARGET: VirtAddr = VirtAddr(0x2_0000);

/// Two pages of two processes: one full of ones, the other of zeroes.
fn memory() -> Memory {
    let mut memory = Memory::default();
    for (process, at) in [(0, SOURCE), (1, TARGET)] {
        memory.add_process(process);
        memory.map_anonymous(process, VirtRange::new(at, 4096).expect("a page"), Protection::ReadWrite);
    }
    memory.write(0, SOURCE, &[1; 64]);
    memory
}

fn piece(process: usize, at: VirtAddr) -> Piece {
    Piece { process, at, len: 64 }
}

fn begin(memory: &mut Memory) {
    let (source, target) = ([piece(0, SOURCE)], [piece(1, TARGET)]);
    assert!(memory.can_follow(&source, &target));
    memory.begin_transfer(7, &source, &target, false);
}

#[test]
fn a_wrong_byte_is_seen() {
    let mut memory = memory();
    memory.read(0, SOURCE, &[1; 64]).expect("what was written");
    let mut wrong = [1; 64];
    wrong[63] = 2;
    let error = memory.read(0, SOURCE, &wrong).expect_err("one byte is another");
    assert_eq!((error.at, error.found, error.known), (SOURCE.offset(63), 2, 1));
}

#[test]
fn a_transfer_under_way_explains_its_bytes_and_no_others() {
    let mut memory = memory();
    memory.read(1, TARGET, &[1; 64]).expect_err("nothing is under way");
    begin(&mut memory);
    let mut half = [0; 64];
    half[..32].fill(1);
    memory.read(1, TARGET, &half).expect("half of it has landed");
    memory.read(1, TARGET, &[2; 64]).expect_err("neither the old nor the new");
    memory.read(1, TARGET.offset(64), &[1]).expect_err("one byte too far");
}

#[test]
fn a_transfer_that_succeeded_is_there_and_the_old_bytes_are_not() {
    let mut memory = memory();
    begin(&mut memory);
    memory.end_transfer(7, true);
    memory.read(1, TARGET, &[0; 64]).expect_err("a stale entry took it elsewhere");
    memory.read(1, TARGET, &[1; 64]).expect("all of it");
}

#[test]
fn a_transfer_that_failed_may_have_landed_in_part() {
    let mut memory = memory();
    begin(&mut memory);
    memory.end_transfer(7, false);
    let mut part = [0; 64];
    part[5] = 1;
    memory.read(1, TARGET, &part).expect("one byte of it");
    memory
        .read(1, TARGET, &[1; 64])
        .expect_err("what was seen is what is there, now that nothing is under way");
}

#[test]
fn a_source_that_changes_meanwhile_may_be_seen_either_way() {
    let mut memory = memory();
    begin(&mut memory);
    memory.write(0, SOURCE, &[3; 64]);
    memory.end_transfer(7, true);
    let mut mixed = [1; 64];
    mixed[9] = 3;
    memory.read(1, TARGET, &mixed).expect("each byte is what the source was at some moment");
    memory.read(1, TARGET, &[0; 64]).expect_err("but never what was there before");
}

#[test]
fn what_was_discarded_is_zero_or_written_since() {
    let mut memory = memory();
    memory.write(1, TARGET, &[9; 64]);
    begin(&mut memory);
    memory.discard(1, VirtRange::new(TARGET, 4096).expect("a page"));
    memory.end_transfer(7, true);
    let mut mixed = [0; 64];
    mixed[1] = 1;
    memory.read(1, TARGET, &mixed).expect("some of it landed before, some after");
    memory.read(1, TARGET, &[9; 64]).expect_err("what was thrown away came back");
}

#[test]
fn a_fork_keeps_what_was_and_sees_no_more() {
    let mut memory = memory();
    begin(&mut memory);
    memory.fork(1, 2);
    memory.write(0, SOURCE, &[4; 64]);
    memory.end_transfer(7, true);
    memory.read(2, TARGET, &[4; 64]).expect_err("a write into the parent reached the child");
    memory.read(2, TARGET, &[1; 64]).expect("it had landed before");
}
