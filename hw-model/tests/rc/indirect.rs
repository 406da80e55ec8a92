//! Indirect keys: pieces of other keys and of the bus as one range, and no more than the pieces.

use crate::world::{ALL, Host, Pair, Region, config, pattern};
use hw_model::addr::{DmaAddr, PAGE_SIZE, RegionAddr};
use hw_model::hca::{
    Access, CreateKeyError, FastKeySpec, FastMap, FastMemory, FaultOutcome, HcaConfig, IndirectEntry,
    IndirectKeySpec, IndirectList, IndirectListError, IndirectTarget, Key, MIN_INDIRECT_ENTRY, PathMtu,
    Remote, SendRequest, Status,
};
use proptest::prelude::*;

const BASE: u64 = 0x5000;

fn piece(region: &Region, at: u64, length: u64) -> IndirectEntry {
    let target = IndirectTarget::Key { key: region.key, address: RegionAddr(region.base + at) };
    IndirectEntry { target, length }
}

fn on_bus(region: &Region, at: u64, length: u64) -> IndirectEntry {
    IndirectEntry { target: IndirectTarget::Dma(DmaAddr(region.phys(at))), length }
}

fn key_over(host: &Host, access: Access, entries: Vec<IndirectEntry>) -> Key {
    let list = IndirectList::new(entries).expect("a list");
    let spec = IndirectKeySpec { pd: host.pd, access, address: RegionAddr(BASE), list };
    host.hca.create_indirect_key(spec).expect("a key")
}

fn at(key: Key, offset: u64) -> Remote {
    Remote { key, address: RegionAddr(BASE + offset) }
}

/// Entries, in the numbers of a case: by key or on the bus, where, how long.
fn some_entries() -> impl Strategy<Value = Vec<(bool, u64, u64)>> {
    let length = prop_oneof![Just(MIN_INDIRECT_ENTRY), MIN_INDIRECT_ENTRY..6000, Just(4096_u64)];
    let ends = prop_oneof![1..6000_u64, Just(1_u64)];
    let one = move || (any::<bool>(), 0..30_000_u64);
    let middle = prop::collection::vec((one(), length), 0..40);
    ((one(), ends.clone()), middle, (one(), ends)).prop_map(|(first, middle, last)| {
        let all = std::iter::once(first).chain(middle).chain([last]);
        all.map(|((by_key, at), length)| (by_key, at, length)).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_of_an_indirect_key_is_where_its_entry_says(
        entries in some_entries(),
        mtu in prop_oneof![Just(256_u32), Just(4096), Just(65536)],
        from in any::<prop::sample::Index>(), to in any::<prop::sample::Index>(), offset in 0..4096_u64,
    ) {
        let mtu = PathMtu::new(mtu).expect("an MTU");
        let mut pair = Pair::new(HcaConfig { path_mtu: mtu, ..config() });
        let memory = pair.b.region_at(0x10_0000, offset, 40_000, ALL, pair.b.pd);
        let before = pattern(1, 40_000);
        pair.b.fill(&memory, 0, &before);
        let list = entries.iter().map(|(by_key, at, length)| match by_key {
            true => piece(&memory, *at, *length),
            false => on_bus(&memory, *at, *length),
        });
        let key = key_over(&pair.b, ALL, list.collect());
        let places: Vec<u64> = entries.iter().flat_map(|(_, at, length)| *at..at + length).collect();
        let (from, to) = (from.index(places.len()), to.index(places.len()));
        let (from, to) = (from.min(to), from.max(to) + 1);
        let (length, local) = ((to - from) as u64, pair.a.region(300_000));
        let sges = [local.sge(0, length as u32)];
        prop_assert_eq!(pair.ask(&SendRequest::read(1, &sges, at(key, from as u64))), Status::Success);
        let expected: Vec<u8> = places[from..to].iter().map(|place| before[*place as usize]).collect();
        prop_assert!(pair.a.bytes(&local, 0, length) == expected, "read");
        let data = pattern(2, length);
        pair.a.fill(&local, 0, &data);
        prop_assert_eq!(pair.ask(&SendRequest::write(2, &sges, at(key, from as u64))), Status::Success);
        let mut after = before;
        for (place, byte) in places[from..to].iter().zip(&data) {
            after[*place as usize] = *byte;
        }
        prop_assert!(pair.b.bytes(&memory, 0, 40_000) == after, "write");
    }
}

#[test]
fn entries_of_one_power_of_two_are_computed_and_lead_to_the_same_bytes() {
    let mut pair = Pair::new(config());
    let memory = pair.b.region(64 << 10);
    let list = |lengths: &[u64]| {
        let entry = |(index, length): (usize, &u64)| piece(&memory, 16_000 * (3 - index as u64), *length);
        IndirectList::new(lengths.iter().enumerate().map(entry).collect()).expect("a list")
    };
    assert!(list(&[4096, 4096, 4096]).is_fixed_size());
    assert!(list(&[4096, 4096, 100]).is_fixed_size());
    assert!(!list(&[4096, 4096, 4097]).is_fixed_size());
    assert!(!list(&[100, 4096, 4096]).is_fixed_size());
    assert!(!list(&[5000, 5000]).is_fixed_size());
    let key = key_over(&pair.b, ALL, list(&[4096, 4096, 100]).entries().to_vec());
    let local = pair.a.region(9000);
    pair.a.fill(&local, 0, &pattern(1, 9000));
    let sges = [local.sge(0, 8000)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, at(key, 292))), Status::Success);
    let got = [
        pair.b.bytes(&memory, 48_292, 4096 - 292),
        pair.b.bytes(&memory, 32_000, 4096),
        pair.b.bytes(&memory, 16_000, 100),
    ];
    assert!(got.concat() == pattern(1, 8000));
}

/// The peer's request for `length` bytes at `offset` of `key` is refused, and no byte of `memory` changes.
fn refused(pair: &mut Pair, memory: &Region, remote: Remote, length: u32) {
    let before = pair.b.bytes(memory, 0, 16_000);
    let local = pair.a.region(16_000);
    pair.a.fill(&local, 0, &pattern(8, 16_000));
    let sges = [local.sge(0, length)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, remote)), Status::RemoteAccessError);
    assert!(pair.b.bytes(memory, 0, 16_000) == before, "a refused request moved bytes");
}

#[test]
fn bounds_and_rights_of_the_indirect_key_hold() {
    for (access, offset, length) in
        [(ALL, 0, 8001), (ALL, 8000, 1), (ALL, u64::MAX, 1), (Access::REMOTE_READ, 0, 1)]
    {
        let mut pair = Pair::new(config());
        let memory = pair.b.region(16_000);
        let key = key_over(&pair.b, access, vec![piece(&memory, 0, 4000), piece(&memory, 8000, 4000)]);
        refused(&mut pair, &memory, Remote { key, address: RegionAddr(BASE.wrapping_add(offset)) }, length);
    }
}

#[test]
fn the_keys_below_are_checked_at_every_access() {
    type Spoil = fn(&Pair, &Region) -> IndirectEntry;
    let cases: [(&str, Spoil); 6] = [
        ("past its end", |_, memory| piece(memory, 15_990, 64)),
        ("of another domain", |pair, _| {
            let pd = pair.b.hca.alloc_pd().expect("a domain");
            piece(&pair.b.region_at(0, 0, 4096, ALL, pd), 0, 64)
        }),
        ("that may not be written", |pair, _| {
            piece(&pair.b.region_at(0, 0, 4096, Access::REMOTE_READ, pair.b.pd), 0, 64)
        }),
        ("destroyed", |pair, _| {
            let gone = pair.b.region(4096);
            pair.b.hca.destroy_key(gone.key).expect("live");
            piece(&gone, 0, 64)
        }),
        ("indirect", |pair, memory| {
            let key = key_over(&pair.b, ALL, vec![piece(memory, 0, 64)]);
            IndirectEntry { target: IndirectTarget::Key { key, address: RegionAddr(BASE) }, length: 64 }
        }),
        ("not registered", |pair, _| {
            let spec = FastKeySpec { pd: pair.b.pd, max_entries: 1 };
            let key = pair.b.hca.create_fast_key(spec).expect("a key");
            IndirectEntry { target: IndirectTarget::Key { key, address: RegionAddr(0) }, length: 64 }
        }),
    ];
    for (what, spoil) in cases {
        println!("a key {what}");
        let mut pair = Pair::new(config());
        let memory = pair.b.region(16_000);
        let bad = spoil(&pair, &memory);
        let key = key_over(&pair.b, ALL, vec![bad, piece(&memory, 0, 64)]);
        refused(&mut pair, &memory, at(key, 0), 128);
    }
}

#[test]
fn a_key_over_itself_is_refused_and_not_waited_for() {
    let mut pair = Pair::new(config());
    let memory = pair.b.region(16_000);
    let key = pair.b.hca.create_fast_key(FastKeySpec { pd: pair.b.pd, max_entries: 4 }).expect("a key");
    let itself =
        IndirectEntry { target: IndirectTarget::Key { key, address: RegionAddr(BASE + 64) }, length: 64 };
    let list = IndirectList::new(vec![itself, piece(&memory, 0, 64)]).expect("a list");
    let map = FastMap { address: RegionAddr(BASE), memory: FastMemory::Gaps(list) };
    pair.b.hca.map_fast_key(key, map).expect("room");
    pair.qb.post_send(&SendRequest::register(1, key, ALL)).expect("posted");
    pair.run_without_faults();
    assert_eq!(pair.b.take()[0].status, Status::Success);
    refused(&mut pair, &memory, at(key, 0), 1);
}

#[test]
fn a_missing_page_below_is_asked_for_by_the_key_that_has_it() {
    let mut pair = Pair::new(config());
    let memory = pair.b.region(16_000);
    let key = key_over(&pair.b, ALL, vec![piece(&memory, 4000, 1000), piece(&memory, 9000, 3000)]);
    memory.absent(2);
    // The first page has an entry but vanishes under the copy.
    pair.b.memory.gone.lock().push((memory.first_page, false));
    let local = pair.a.region(4000);
    pair.a.fill(&local, 0, &pattern(1, 4000));
    let sges = [local.sge(0, 4000)];
    pair.qa.post_send(&SendRequest::write(1, &sges, at(key, 0))).expect("posted");
    let mut asked = Vec::new();
    pair.run(|host, fault| {
        asked.push((fault.key, fault.address.0 - memory.base, fault.length));
        memory.present(memory.page_of(fault), true);
        if memory.page_of(fault) == 0 {
            host.memory.gone.lock().clear();
        }
        FaultOutcome::Resolved
    });
    assert_eq!(asked, [(memory.key, 9000, 3000), (memory.key, 4000, 1000)]);
    assert_eq!(pair.a.take()[0].status, Status::Success);
    let got = [pair.b.bytes(&memory, 4000, 1000), pair.b.bytes(&memory, 9000, 3000)];
    assert_eq!(got.concat(), pattern(1, 4000));
}

#[test]
fn lists_that_no_device_takes_are_refused_by_name() {
    let pair = Pair::new(config());
    let memory = pair.b.region(16_000);
    let list = |lengths: &[u64]| {
        IndirectList::new(lengths.iter().map(|length| piece(&memory, 0, *length)).collect())
            .map(|list| list.bytes())
    };
    assert_eq!(list(&[]), Err(IndirectListError::Empty));
    assert_eq!(list(&[1, 64, 1]), Ok(66));
    assert_eq!(list(&[1, 63, 1]), Err(IndirectListError::TooShort { entry: 1, length: 63, least: 64 }));
    assert_eq!(list(&[1, 0]), Err(IndirectListError::TooShort { entry: 1, length: 0, least: 1 }));
    assert_eq!(list(&[100, u64::MAX]), Err(IndirectListError::TooLong { entry: 1 }));
    let hca = &pair.b.hca;
    let spec = IndirectKeySpec {
        pd: pair.b.pd,
        access: ALL,
        address: RegionAddr(u64::MAX - 99),
        list: IndirectList::new(vec![piece(&memory, 0, 101)]).expect("a list"),
    };
    let before = hca.live_objects();
    let past = CreateKeyError::PastTop { address: RegionAddr(u64::MAX - 99), length: 101 };
    assert_eq!(hca.create_indirect_key(spec.clone()), Err(past));
    let needs = CreateKeyError::NeedsLocalWrite { access: Access::REMOTE_ATOMIC };
    let remote_only = IndirectKeySpec { address: RegionAddr(0), access: Access::REMOTE_ATOMIC, ..spec };
    assert_eq!(hca.create_indirect_key(remote_only), Err(needs));
    assert_eq!(hca.live_objects(), before);
    let key = key_over(&pair.b, ALL, vec![piece(&memory, 0, 64)]);
    hca.destroy_indirect_key(memory.key).expect_err("another sort of key");
    hca.destroy_key(key).expect_err("another sort of key");
    hca.destroy_indirect_key(key).expect("live");
    assert_eq!(hca.live_objects(), before);
}

/// A message of many pieces, each an indirect key of the shortest entries there may be: the most spans of one packet. That
/// they fit is asserted where they are filled in.
#[test]
fn the_shortest_entries_fill_a_packet_without_growing_anything() {
    for mtu in [256, 65536] {
        let mut pair = Pair::new(HcaConfig { path_mtu: PathMtu::new(mtu).expect("an MTU"), ..config() });
        let source = pair.a.region(200_000);
        let remote = pair.b.region(200_000);
        let data = pattern(1, 200_000);
        pair.a.fill(&source, 0, &data);
        let mut expected = Vec::new();
        let sges: Vec<_> = (0..4)
            .map(|number| {
                let place = |entry: u64| (entry * 150 + number * 40_000) % 199_000 / 7 * 7;
                let lengths = [1].into_iter().chain(std::iter::repeat_n(64, 200)).chain([1]);
                let entries: Vec<_> =
                    lengths.zip(0..).map(|(length, n)| piece(&source, place(n), length)).collect();
                for entry in &entries {
                    let IndirectTarget::Key { address, .. } = entry.target else { continue };
                    let from = (address.0 - source.base) as usize;
                    expected.extend_from_slice(&data[from..from + entry.length as usize]);
                }
                let key = key_over(&pair.a, Access::empty(), entries);
                hw_model::hca::Sge { key, address: RegionAddr(BASE), length: 12_802 }
            })
            .collect();
        assert_eq!(pair.ask(&SendRequest::write(1, &sges, remote.remote(3))), Status::Success);
        let got = pair.b.bytes(&remote, 3, expected.len() as u64);
        assert!(got == expected, "mtu {mtu}");
        assert!(expected.len() as u64 > 12 * PAGE_SIZE);
    }
}
