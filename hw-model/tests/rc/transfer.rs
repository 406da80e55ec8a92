//! Data arrives, whole and nowhere else.

use crate::world::{ALL, Pair, config, connect, pattern};
use hw_model::hca::{HcaConfig, PathMtu, QpSpec, SendRequest, Status};

fn with_mtu(bytes: u32) -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(bytes).expect("an MTU"), ..config() }
}

#[test]
fn writes_and_reads_of_every_size_over_every_mtu_arrive() {
    for mtu in [256, 1024, 4096, 16384, 65536] {
        for micro_steps in [false, true] {
            let mut pair = Pair::new(HcaConfig { micro_steps, ..with_mtu(mtu) });
            let (from, to) = (pair.a.region(1 << 18), pair.b.region(1 << 18));
            let m = u64::from(mtu);
            for (n, size) in [0, 1, 7, 64, m - 1, m, m + 1, 3 * m - 5, 100_001].into_iter().enumerate() {
                let data = pattern(n as u64, size);
                let (at, to_at) = (n as u64 * 13 + 1, n as u64 * 7 + 3);
                pair.a.fill(&from, at, &data);
                pair.b.fill(&to, 0, &vec![0xee; size as usize + 200]);
                let local = [from.sge(at, size as u32)];
                let write = SendRequest::write(1, &local, to.remote(to_at));
                assert_eq!(pair.ask(&write), Status::Success);
                assert_eq!(pair.b.bytes(&to, to_at, size), data, "write of {size} over MTU {mtu}");
                assert_eq!(pair.b.bytes(&to, to_at - 1, 1), [0xee], "a byte before was hit");
                assert_eq!(pair.b.bytes(&to, to_at + size, 1), [0xee], "a byte behind was hit");

                pair.a.fill(&from, at - 1, &vec![0xdd; size as usize + 2]);
                let read = SendRequest::read(2, &local, to.remote(to_at));
                assert_eq!(pair.ask(&read), Status::Success);
                assert_eq!(pair.a.bytes(&from, at, size), data, "read of {size} over MTU {mtu}");
                assert_eq!(pair.a.bytes(&from, at - 1, 1), [0xdd], "a byte before was hit");
                assert_eq!(pair.a.bytes(&from, at + size, 1), [0xdd], "a byte behind was hit");
            }
            assert_eq!(pair.a.hca.stats().retries, 0, "a lossless link needs no retry");
        }
    }
}

#[test]
fn a_message_is_gathered_from_and_scattered_to_many_pieces() {
    let mut pair = Pair::new(with_mtu(1024));
    // Zero-based on one side, in the middle of a page on the other, and the two have nothing to do with each other.
    let locals: Vec<_> =
        (0..3u64).map(|n| pair.a.region_at(n << 40, 100 + n, 20_000, ALL, pair.a.pd)).collect();
    let remote = pair.b.region_at(0, 4095, 20_000, ALL, pair.b.pd);
    let sges = [
        locals[0].sge(5, 1),
        locals[1].sge(0, 0),
        locals[1].sge(19_000, 1000),
        locals[2].sge(3, 5000),
        locals[0].sge(4096, 1023),
    ];
    let total: u64 = sges.iter().map(|sge| u64::from(sge.length)).sum();
    let spec = QpSpec { max_sges: 5, ..QpSpec::new(pair.a.pd, &pair.a.cq) };
    pair.qa = pair.a.hca.create_qp(&spec).expect("a queue pair");
    pair.qb = pair.b.qp();
    connect(&pair.qa, &pair.qb);
    let data = pattern(9, total);
    pair.b.fill(&remote, 77, &data);
    assert_eq!(pair.ask(&SendRequest::read(1, &sges, remote.remote(77))), Status::Success);
    pair.b.fill(&remote, 77, &vec![0; total as usize]);
    assert_eq!(pair.ask(&SendRequest::write(2, &sges, remote.remote(77))), Status::Success);
    assert_eq!(pair.b.bytes(&remote, 77, total), data, "what was scattered and gathered again is the same");
    assert_eq!(pair.a.bytes(&locals[2], 3, 5000), data[1001..6001]);
}

#[test]
fn bytes_are_placed_in_increasing_order() {
    let mut pair = Pair::new(with_mtu(4096));
    let (from, to) = (pair.a.region(60_000), pair.b.region(60_000));
    *pair.b.memory.writes.lock() = Some(Vec::new());
    let sges = [from.sge(11, 50_000)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, to.remote(500))), Status::Success);
    let writes = pair.b.memory.writes.lock().take().expect("recorded");
    let mut next = to.phys(500);
    for (at, len) in writes {
        assert_eq!(at, next, "a later byte was placed before an earlier one");
        next += len as u64;
    }
    assert_eq!(next, to.phys(50_500));
}

#[test]
fn an_hca_talks_to_itself() {
    let mut pair = Pair::new(with_mtu(1024));
    let (qa, qb) = (pair.a.qp(), pair.a.qp());
    connect(&qa, &qb);
    let (from, to) = (pair.a.region(10_000), pair.a.region(10_000));
    pair.a.fill(&from, 0, &pattern(3, 10_000));
    pair.qa = qa;
    let sges = [from.sge(0, 10_000)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, to.remote(0))), Status::Success);
    assert_eq!(pair.a.bytes(&to, 0, 10_000), pattern(3, 10_000));
}
