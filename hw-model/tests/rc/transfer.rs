//! Data arrives, whole and nowhere else.

use crate::world::{Pair, config, pattern};
use hw_model::hca::{HcaConfig, PathMtu, SendRequest, Status};

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
