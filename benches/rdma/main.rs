//! RDMA write between two HCAs of one process, by processor time, in ratios.
//!
//! What was expected:
//!
//! * **Large**: a message is copied once, on the thread that posts, by packets of 64 KiB. A packet costs about 0.5 us of
//!   protocol both ways and two translations a page at 20 ns, so at 9 GB/s of memcpy (7.3 us for 64 KiB) about 0.87 of
//!   memcpy at 64 KiB, and more at 1 MiB, where acknowledgements are shared.
//! * **On demand**, resident: the same translation and copy; but its IO pages are 4 KiB where a pinned region has large
//!   leaves, so each of its pages misses the IOTLB once a pass: 40 ns of 450, if nothing else.
//! * **Small**: alone, a write is posted, sent, placed, acknowledged and polled in three runs of an engine, some 40 locked
//!   instructions of 6 ns and as much again of plain work: 0.6 us. In a list of 16 the runs and the acknowledgement are
//!   shared: under 0.5 us.
//! * **Many queue pairs**: 30 cache lines of both ends are cold, and 3 of a region at either. Who posts knows where the ends
//!   lie and asks for all at once: two or three misses of 100 ns one after the other, once a list. Of a region each line tells
//!   where the next is; those of a list are asked for together, those of a write alone come one after the other. What
//!   nobody does better, on this machine and in this run, is beside it: the lines read and no more ([`floor`]).

mod clock;
mod ends;
mod floor;

use clock::compare;
use ends::{Ends, LIST, Writer};
use floor::Floor;
use mr::RegisterOptions;
use std::hint::black_box;

/// Bytes of the large regions: more than the caches hold.
const REGION: u64 = 64 << 20;
const MANY_QPS: usize = 10_000;
const MANY_KEYS: u64 = 100_000;
/// Rounds of small writes in a turn: as many as there are queue pairs.
const ROUNDS: u32 = 10_000;

/// One figure beside its target.
fn say(what: &str, measured: f64, unit: &str, target: &str) {
    println!("{what:<64} {measured:>8.2} {unit:<6} target {target}");
}

fn large(turns: u32) {
    let mut ends = Ends::new();
    let (source, target) = (ends.memory(REGION), ends.memory(REGION));
    let from = [ends.far.register(&source, RegisterOptions::pinned())];
    let pinned = [ends.near.register(&target, RegisterOptions::pinned())];
    let demand = [ends.near.register(&target, RegisterOptions::on_demand())];
    let pairs = ends.connect(1);
    let mut writers =
        [Writer::new(&ends, &pairs, &from, &pinned), Writer::new(&ends, &pairs, &from, &demand)];
    let (read, mut written) = (vec![1_u8; REGION as usize], vec![0_u8; REGION as usize]);
    let mut offset = 0;
    for (bytes, least) in [(64 << 10, "0.75"), (1 << 20, "0.85")] {
        let rounds = (REGION / bytes) as u32;
        let size = bytes as usize;
        let mut memcpy = || {
            offset = (offset + size) % (REGION as usize - size + 1) / 64 * 64;
            written[offset..offset + size].copy_from_slice(&read[offset..offset + size]);
            black_box(&written[offset]);
        };
        let [pinned, demand] = &mut writers;
        let (mut pinned, mut demand) = (|| pinned.one(bytes as u32), || demand.one(bytes as u32));
        let [memcpy, pinned, demand] = compare(turns, rounds, [&mut memcpy, &mut pinned, &mut demand]);
        say(&format!("write of {} KiB, pinned / memcpy", bytes >> 10), memcpy / pinned, "", least);
        say(&format!("write of {} KiB, on demand / pinned", bytes >> 10), pinned / demand, "", "0.95");
    }
}

fn small(turns: u32) {
    let mut ends = Ends::new();
    let (source, target) = (ends.memory(1 << 16), ends.memory(1 << 16));
    let from = [ends.far.register(&source, RegisterOptions::pinned())];
    let to = [ends.near.register(&target, RegisterOptions::pinned())];
    let (one, many) = (ends.connect(1), ends.connect(MANY_QPS));
    let (far_keys, near_keys) = (ends.far.keys(MANY_KEYS), ends.near.keys(MANY_KEYS));
    let mut one = Writer::new(&ends, &one, &from, &to);
    let [latency] = compare(turns, ROUNDS, [&mut || one.one(8)]);
    say("write of 8 bytes, from post to completion", latency / 1e3, "us", "1");

    let mut crowd = Writer::new(&ends, &many, &from, &to);
    let mut all = Writer::new(&ends, &many, &far_keys, &near_keys);
    let mut floors = [(1, 1), (MANY_QPS, 1), (MANY_QPS, MANY_KEYS as usize)].map(|(a, b)| Floor::new(a, b));
    let memory = [1, LIST].map(|writes| {
        let [one, crowd, all] = &mut floors;
        let contestants: [&mut dyn FnMut(); 3] =
            [&mut || one.read(writes), &mut || crowd.read(writes), &mut || all.read(writes)];
        compare(turns, ROUNDS, contestants)
    });
    for bytes in [64, 4096] {
        let contestants: [&mut dyn FnMut(); 3] =
            [&mut || one.one(bytes), &mut || crowd.one(bytes), &mut || all.one(bytes)];
        tell("one at a time", bytes, 1, compare(turns, ROUNDS, contestants), memory[0]);
        let contestants: [&mut dyn FnMut(); 3] =
            [&mut || one.list(bytes), &mut || crowd.list(bytes), &mut || all.list(bytes)];
        tell("in lists of 16", bytes, LIST, compare(turns, ROUNDS, contestants), memory[1]);
    }
}

/// One queue pair; many; many with many regions. `memory` is the same for their lines alone: what is more there than with one
/// is more for any write.
fn tell(how: &str, bytes: u32, count: usize, [one, crowd, all]: [f64; 3], memory: [f64; 3]) {
    let limit = |index: usize| format!("0.8, limit {:.2}", one / (one + memory[index] - memory[0]));
    let target = if bytes == 64 { "2" } else { "none" };
    say(&format!("writes of {bytes} bytes {how}"), count as f64 * 1e3 / one, "M/s", target);
    say(&format!("  over {MANY_QPS} queue pairs / over one"), one / crowd, "", &limit(1));
    say(&format!("  over these and {MANY_KEYS} regions / over one"), one / all, "", &limit(2));
}

fn main() {
    // `cargo bench -- --test`: that it runs at all.
    let turns = if std::env::args().any(|argument| argument == "--test") { 1 } else { 12 };
    large(turns);
    small(turns);
}
