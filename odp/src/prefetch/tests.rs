use super::*;
use hw_model::addr::PAGE_SIZE;

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

fn range(at: u64, len: u64) -> VirtRange {
    VirtRange::new(VirtAddr(at), len).expect("fits")
}

/// Faults in the order in which a device meets them, where what was asked for is there: how many faults `accesses` cost.
fn faults(policy: PrefetchPolicy, accesses: impl IntoIterator<Item = (u8, VirtRange)>) -> u64 {
    let mut streams = Streams::default();
    let mut present: std::collections::HashSet<u64> = std::collections::HashSet::new();
    let pages = |range: VirtRange| {
        let aligned = range.page_aligned();
        (0..aligned.page_count()).map(move |page| aligned.start().page_number() + page)
    };
    let mut faults = 0;
    for (source, access) in accesses {
        while let Some(missing) = pages(access).find(|page| !present.contains(page)) {
            faults += 1;
            let end = access.page_aligned().end().0;
            let fault = range(missing * PAGE_SIZE, end - missing * PAGE_SIZE);
            present.extend(pages(fault));
            if let Some(ahead) = streams.observe(policy, source, fault) {
                ahead.pieces().for_each(|piece| present.extend(pages(piece)));
            }
        }
    }
    faults
}

fn sequential(len: u64, step: u64) -> impl Iterator<Item = (u8, VirtRange)> {
    (0..len / step).map(move |n| (0, range(M + n * step, step)))
}

/// The figure that the issue asks for, by the policy alone.
#[test]
fn a_sequential_stream_of_a_gib_costs_a_few_dozen_faults() {
    for step in [4 * K, 64 * K, M] {
        let cold = faults(PrefetchPolicy::ADAPTIVE, sequential(1 << 30, step));
        assert!((2..60).contains(&cold), "{cold} faults in steps of {step}");
    }
    assert_eq!(faults(PrefetchPolicy::Off, sequential(64 * M, 64 * K)), 1024, "off is off");
    assert_eq!(faults(PrefetchPolicy::Fixed { window: M - 64 * K }, sequential(64 * M, 64 * K)), 64);
}

#[test]
fn a_stream_backwards_is_a_stream() {
    let backwards = (0..1024).rev().map(|n| (0, range(M + n * 64 * K, 64 * K)));
    let cold = faults(PrefetchPolicy::ADAPTIVE, backwards);
    assert!(cold < 30, "{cold} faults");
}

#[test]
fn equal_distances_are_a_stream_too() {
    for stride in [8 * K, 40 * K, M] {
        let column = (0..1000).map(|row| (0, range(M + row * stride, 4 * K)));
        let cold = faults(PrefetchPolicy::ADAPTIVE, column);
        assert!(cold < 60, "{cold} faults at a stride of {stride}");
    }
}

#[test]
fn two_streams_of_one_queue_pair_do_not_hide_each_other() {
    let both = (0..512).flat_map(|n| [range(M + n * 64 * K, 64 * K), range(4096 * M + n * 64 * K, 64 * K)]);
    let cold = faults(PrefetchPolicy::ADAPTIVE, both.map(|access| (0, access)));
    assert!(cold < 60, "{cold} faults");
}

/// What would be wrong if this failed: random access would bring in what nobody asked for.
#[test]
fn random_access_is_left_alone() {
    let mut streams = Streams::default();
    let mut at = 1_u64;
    let mut asked = 0;
    for _ in 0..10_000 {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let fault = range((at >> 20) & !(PAGE_SIZE - 1), PAGE_SIZE);
        asked += streams.observe(PrefetchPolicy::ADAPTIVE, 0, fault).map_or(0, |ahead| ahead.bytes());
    }
    assert_eq!(asked, 0);
}

#[test]
fn a_window_grows_to_its_limit_and_begins_anew_with_another_stream() {
    let mut streams = Streams::default();
    let policy = PrefetchPolicy::Adaptive { first: 16 * K, most: 64 * K };
    let mut ask = |at| streams.observe(policy, 0, range(at, 4 * K)).map(|ahead| ahead.bytes());
    assert_eq!(ask(0x10_0000), None, "one fault is no stream");
    assert_eq!(ask(0x10_1000), Some(16 * K));
    assert_eq!(ask(0x10_6000), Some(32 * K), "right behind the window");
    assert_eq!(ask(0x10_f000), Some(64 * K));
    assert_eq!(ask(0x12_0000), Some(64 * K), "the limit");
    assert_eq!(ask(0x9000_0000), None, "somewhere else");
    assert_eq!(ask(0x9000_1000), Some(16 * K));
}

#[test]
fn what_is_known_of_queue_pairs_is_bounded() {
    let mut streams = Streams::default();
    for source in 0..10 * SOURCES {
        for at in [M, 2 * M + 4 * K, 64 * M, 128 * M, 256 * M, 512 * M] {
            let _ = streams.observe(PrefetchPolicy::ADAPTIVE, source, range(at, 4 * K));
        }
    }
    assert_eq!(streams.sources.len(), SOURCES);
    assert!(streams.sources.values().all(|source| source.streams.len() <= STREAMS));
    streams.forget(10 * SOURCES - 1);
    assert_eq!(streams.sources.len(), SOURCES - 1);
}

#[test]
fn nothing_overflows_at_the_ends_of_the_address_space() {
    let top = u64::MAX - 8 * PAGE_SIZE + 1;
    let mut streams = Streams::default();
    for at in [top, top + PAGE_SIZE, top + 2 * PAGE_SIZE, 2 * PAGE_SIZE, PAGE_SIZE, 0] {
        if let Some(ahead) = streams.observe(PrefetchPolicy::ADAPTIVE, 0, range(at, PAGE_SIZE)) {
            assert!(ahead.pieces().all(|piece| piece.len() <= 64 * M));
        }
    }
}
