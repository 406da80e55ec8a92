use super::*;
use crate::hca::page_list::PageList;
use crate::hca::pd::PdTable;
use crate::sync::atomic::Ordering;
use proptest::prelude::*;
use std::collections::HashMap;

fn spec(pd: Pd, address: u64) -> KeySpec {
    KeySpec {
        pd,
        access: Access::all(),
        address: RegionAddr(address),
        length: 0,
        first_page_offset: 0,
        pages: Arc::new(PageList::new(0).expect("an empty list")),
    }
}

fn address(target: &Target) -> u64 {
    match target {
        Target::Pages(spec) => spec.address.0,
        Target::Indirect(spec) => spec.address.0,
        Target::Implicit(spec) => spec.address.0,
        Target::Window(bound) => bound.base().0,
        Target::Null(spec) => spec.page.0,
    }
}

fn pd() -> Pd {
    PdTable::new(1).alloc().expect("a domain")
}

#[test]
fn keys_are_not_given_again_while_in_quarantine() {
    let (drawn, pd) = (KeyTable::new(4, 2, 1), pd());
    let keys: Vec<_> = (0..4).map(|_| drawn.create(spec(pd, 0)).expect("room")).collect();
    // The same seed draws the same keys; one that is set aside is passed over.
    let table = KeyTable::new(4, 2, 1);
    table.set_aside(keys[0]);
    assert_eq!(table.create(spec(pd, 0)), Ok(keys[1]));
    // Two more, and the first is no longer among the last two.
    let table = KeyTable::new(4, 2, 1);
    table.set_aside(keys[0]);
    table.set_aside(keys[1]);
    table.set_aside(keys[2]);
    assert_eq!(table.create(spec(pd, 0)), Ok(keys[0]));
    assert_eq!(table.create(spec(pd, 0)), Ok(keys[3]));
}

/// With so few words that keys meet all the time, and with as many turns as it takes to fill them with tombstones.
#[test]
fn a_table_that_was_used_a_hundred_thousand_times_is_still_clean() {
    let (table, pd) = (KeyTable::new(8, 0, 2), pd());
    let mut live = Vec::new();
    let mut gone = Vec::new();
    for turn in 0..100_000u64 {
        if live.len() == 8 {
            let key = live.swap_remove(turn as usize * 5 % 8);
            table.destroy(key, false, |_| true).expect("live");
            gone.push(key);
        }
        live.push(table.create(spec(pd, turn)).expect("room"));
    }
    assert!(live.iter().all(|key| table.with(*key, |_| ()).is_ok()));
    let reached = gone.iter().filter(|key| table.with(**key, |_| ()).is_ok() && !live.contains(key)).count();
    assert_eq!(reached, 0, "a destroyed key reaches memory");
    assert_eq!(table.live(), 8);
    assert!(
        table.tombstones() <= 8,
        "{} words are tombstones: probes get longer and longer",
        table.tombstones()
    );
}

proptest! {
    #[test]
    fn the_table_agrees_with_a_map(turns in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..400)) {
        let (table, pd) = (KeyTable::new(16, 4, 3), pd());
        let mut model: HashMap<Key, u64> = HashMap::new();
        for (number, (create, which)) in turns.into_iter().enumerate() {
            let number = number as u64;
            if create {
                match table.create(spec(pd, number)) {
                    Ok(key) => prop_assert!(model.insert(key, number).is_none()),
                    Err(error) => {
                        prop_assert_eq!(error, CreateKeyError::TooMany { max: 16 });
                        prop_assert_eq!(model.len(), 16);
                    }
                }
            } else if !model.is_empty() {
                let mut keys: Vec<_> = model.keys().copied().collect();
                keys.sort();
                let key = keys[which.index(keys.len())];
                let target = table.destroy(key, false, |_| true).expect("live");
                prop_assert_eq!(Some(address(&target)), model.remove(&key));
                prop_assert_eq!(table.destroy(key, false, |_| true).expect_err("gone"), DestroyKeyError::Unknown(UnknownKey { key }));
            }
            for (key, number) in &model {
                prop_assert_eq!(table.with(*key, address), Ok(*number));
            }
        }
    }

    /// Against arithmetic that is wide enough not to overflow.
    #[test]
    fn bounds_are_exact_everywhere(
        base in prop_oneof![0..10u64, u64::MAX - 10..=u64::MAX, any::<u64>()],
        region in 0..20u64,
        at in -12..30i128,
        length in prop_oneof![0..30u64, u64::MAX - 5..=u64::MAX],
    ) {
        let region = region.min((u64::MAX - base).saturating_add(1));
        let spec = KeySpec { length: region, first_page_offset: 100, ..spec(pd(), base) };
        let wide = i128::from(base) + at;
        prop_assume!((0..=i128::from(u64::MAX)).contains(&wide));
        let inside = at >= 0 && at + i128::from(length) <= i128::from(region);
        let answer = spec.authorize(spec.pd, Access::REMOTE_READ, RegionAddr(wide as u64), length);
        prop_assert_eq!(answer, if inside { Ok(100 + at as u64) } else { Err(KeyViolation::OutOfBounds) });
    }
}

#[test]
fn look_ups_beside_changes_find_what_is_live_and_nothing_else() {
    let (table, pd) = (KeyTable::new(64, 0, 4), pd());
    let steady: Vec<_> = (0..32).map(|n| table.create(spec(pd, n)).expect("room")).collect();
    let stop = crate::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(crate::sync::atomic::Ordering::Relaxed) {
                for (number, key) in steady.iter().enumerate() {
                    let found = table.with(*key, address);
                    assert_eq!(found, Ok(number as u64), "a live key was not found, or was another's");
                }
            }
        });
        for turn in 0..20_000 {
            let keys: Vec<_> = (0..8).map(|_| table.create(spec(pd, 1000 + turn)).expect("room")).collect();
            keys.into_iter().for_each(|key| drop(table.destroy(key, false, |_| true).expect("live")));
        }
        stop.store(true, crate::sync::atomic::Ordering::Relaxed);
    });
}

/// One thread registers a key anew, each time under the next key byte and for an address that says which; others look all
/// its names up. What a name leads to is what was registered under it, or nothing.
#[test]
fn a_key_that_is_renamed_under_look_ups_leads_nobody_to_what_another_name_covers() {
    const ROUNDS: u64 = 20_000;
    let (table, pd) = (KeyTable::new(16, 0, 3), pd());
    let first = table.create_fast(FastKeySpec { pd, max_entries: 1 }).expect("room");
    // Neighbours in the table, so that probes pass over names that come and go.
    let others: Vec<_> = (0..8).map(|_| table.create(spec(pd, u64::MAX)).expect("room")).collect();
    let name = |byte: u64| Key(first.0 & !0xff | (byte & 0xff) as u32);
    let done = crate::sync::atomic::AtomicBool::new(false);
    let [found, current] = [0, 0].map(crate::sync::atomic::AtomicU64::new);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut turn = 0;
                while !done.load(Ordering::Relaxed) {
                    // The name of now, and those before and after it.
                    turn += 1;
                    let byte = current.load(Ordering::Relaxed).wrapping_add(turn % 3).wrapping_sub(1);
                    if let Ok(address) = table.with(name(byte), address) {
                        assert_eq!(address & 0xff, byte & 0xff, "a name led to what another covers");
                        found.fetch_add(1, Ordering::Relaxed);
                    }
                    let other = others[turn as usize % others.len()];
                    assert_eq!(table.with(other, address), Ok(u64::MAX), "a key was not found meanwhile");
                }
            });
        }
        for round in 0..ROUNDS {
            let memory = FastMemory::Pages {
                pages: Arc::new(PageList::new(0).expect("an empty list")),
                first_page_offset: 0,
                length: 0,
            };
            let key = name(round);
            current.store(round, Ordering::Relaxed);
            table.map_fast(key, FastMap { address: RegionAddr(round), memory }).expect("its own key");
            table.register_fast(pd, key, Access::empty()).expect("free, and mapped");
            assert_eq!(table.with(key, address), Ok(round));
            let before = found.load(Ordering::Relaxed);
            while round % 256 == 0 && found.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
            table.invalidate(Caller { pd, qpn: Qpn(2) }, key).expect("registered");
            assert!(table.with(key, address).is_err(), "an invalidated key leads somewhere");
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(found.load(Ordering::Relaxed) >= ROUNDS / 256, "look-ups met registrations");
}

/// A key that is reregistered is one thing or the other: its address and its length, looked at together, always agree.
#[test]
fn a_look_up_beside_a_reregistration_sees_the_old_or_the_new_and_no_mixture() {
    let (table, pd) = (KeyTable::new(16, 0, 4), pd());
    let pages = Arc::new(PageList::new(2).expect("two entries"));
    let memory = |at: u64| KeyMemory {
        address: RegionAddr(at),
        length: at,
        first_page_offset: at,
        pages: Arc::clone(&pages),
    };
    let key = table.create(spec(pd, 0)).expect("room");
    let done = crate::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let agrees = table.with(key, |target| match target {
                    Target::Pages(spec) => {
                        spec.address.0 == spec.length && spec.length == spec.first_page_offset
                    }
                    _ => false,
                });
                assert_eq!(agrees, Ok(true));
            }
        });
        for round in 0..20_000 {
            let change = KeyChange { memory: Some(memory(round % 4096)), ..KeyChange::default() };
            table.change(key, change).expect("a region's key");
        }
        done.store(true, Ordering::Relaxed);
    });
}
