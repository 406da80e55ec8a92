//! Memory windows: what a binding gives, to whom, and until when; and that keys cannot be guessed, kept or carried over.

use crate::world::{ALL, Pair, Region, config, connect, pattern};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{
    Access, DestroyKeyError, FaultOutcome, Key, KeyChange, Operation, Pd, QpSpec, QueuePair, Remote,
    ReregKeyError, SendRequest, Status, UnknownKey, WindowBind, WindowKind, WindowSpec,
};
use hw_model::sync::Arc;

const SIZE: u64 = 3 * PAGE_SIZE;
/// Where a window begins in its region, and its bytes.
const AT: u64 = 100;
const LENGTH: u64 = PAGE_SIZE;

fn window(pair: &Pair, kind: WindowKind) -> Key {
    pair.b.hca.alloc_window(WindowSpec { pd: pair.b.pd, kind }).expect("a window")
}

/// The same index with the next key byte (`ib_inc_rkey`).
fn next(key: Key) -> Key {
    Key(key.0 & !0xff | (key.0 + 1) & 0xff)
}

/// `LENGTH` bytes of `region` from `AT` on, for all that a peer can do.
fn part(key: Key, region: &Region) -> WindowBind {
    let access = Access::REMOTE_READ | Access::REMOTE_WRITE;
    WindowBind { key, region: region.key, address: RegionAddr(region.base + AT), length: LENGTH, access }
}

fn bind(bind: WindowBind) -> SendRequest<'static> {
    SendRequest::new(1, Operation::Bind(bind), &[])
}

/// `qp`, a queue pair of host b, does it.
fn manage(pair: &mut Pair, qp: &QueuePair, request: &SendRequest<'_>) -> Status {
    qp.post_send(request).expect("posted");
    pair.run_without_faults();
    let completions = pair.b.take();
    assert_eq!(completions.len(), 1, "one request, one completion: {completions:?}");
    completions[0].status
}

fn bound(pair: &mut Pair, request: WindowBind) -> Status {
    let qb = Arc::clone(&pair.qb);
    manage(pair, &qb, &bind(request))
}

/// A pair of queue pairs for one request, as a refusal ends them.
fn connection(pair: &Pair, pd: Pd) -> (Arc<QueuePair>, Arc<QueuePair>) {
    let (qa, qb) = (pair.a.qp(), pair.b.hca.create_qp(&QpSpec::new(pd, &pair.b.cq)).expect("a queue pair"));
    connect(&qa, &qb);
    (qa, qb)
}

/// How a write and a read of `length` bytes at `remote` end on `qa`, or on queue pairs of their own.
fn reaches(pair: &mut Pair, qa: Option<&QueuePair>, remote: Remote, length: u64) -> [Status; 2] {
    let local = pair.a.region(SIZE);
    let sges = [local.sge(0, length as u32)];
    [SendRequest::write(2, &sges, remote), SendRequest::read(3, &sges, remote)].map(|request| {
        let own = connection(pair, pair.b.pd);
        qa.unwrap_or(&own.0).post_send(&request).expect("posted");
        pair.run_without_faults();
        pair.b.take();
        pair.a.take()[0].status
    })
}

const OK: [Status; 2] = [Status::Success; 2];
const NO: [Status; 2] = [Status::RemoteAccessError; 2];

fn at(key: Key, address: u64) -> Remote {
    Remote { key, address: RegionAddr(address) }
}

#[test]
fn a_window_reaches_its_part_of_the_region_and_not_one_byte_more() {
    for kind in [WindowKind::One, WindowKind::TwoB] {
        let mut pair = Pair::new(config());
        let region = pair.b.region(SIZE);
        let key = window(&pair, kind);
        let base = region.base + AT;
        assert_eq!(reaches(&mut pair, None, at(key, base), 8), NO, "a free window reaches something");
        let new = next(key);
        assert_eq!(bound(&mut pair, part(new, &region)), Status::Success);
        let (local, qa) = (pair.a.region(SIZE), Arc::clone(&pair.qa));
        pair.a.fill(&local, 0, &pattern(3, LENGTH));
        let sges = [local.sge(0, LENGTH as u32)];
        let write = SendRequest::write(2, &sges, at(new, base));
        assert_eq!(pair.ask(&write), Status::Success);
        assert_eq!(pair.b.bytes(&region, AT, LENGTH), pattern(3, LENGTH), "not where the window says");
        assert_eq!(reaches(&mut pair, Some(&qa), at(new, base), LENGTH), OK);
        assert_eq!(reaches(&mut pair, None, at(key, base), 8), NO, "by its old name");
        for (address, length) in [(base - 1, 8), (base + 1, LENGTH), (base + LENGTH, 1), (u64::MAX - 7, 8)] {
            let refused = reaches(&mut pair, None, at(new, address), length);
            assert_eq!(refused, NO, "{kind:?}: {length} bytes at {address:#x}");
        }
    }
}

#[test]
fn the_rights_are_the_windows_whatever_the_region_allows() {
    let mut pair = Pair::new(config());
    // The region itself allows peers nothing.
    let local_only = Access::LOCAL_WRITE | Access::WINDOW_BIND;
    let region = pair.b.region_at(0x4000, 0, SIZE, local_only, pair.b.pd);
    let key = window(&pair, WindowKind::One);
    for (access, status) in [
        (Access::REMOTE_READ, [Status::RemoteAccessError, Status::Success]),
        (Access::REMOTE_WRITE, [Status::Success, Status::RemoteAccessError]),
        (Access::empty(), NO),
    ] {
        let request = WindowBind { access, ..part(key, &region) };
        assert_eq!(bound(&mut pair, request), Status::Success, "{access:?}");
        assert_eq!(reaches(&mut pair, None, at(key, 0x4000 + AT), 8), status, "{access:?}");
        assert_eq!(reaches(&mut pair, None, at(region.key, 0x4000 + AT), 8), NO);
    }
}

#[test]
fn a_window_of_type_2_serves_the_queue_pair_that_bound_it_and_no_other() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let key = window(&pair, WindowKind::TwoB);
    let (qa, qb) = connection(&pair, pair.b.pd);
    assert_eq!(manage(&mut pair, &qb, &bind(part(key, &region))), Status::Success);
    let remote = at(key, region.base + AT);
    assert_eq!(reaches(&mut pair, Some(&qa), remote, 8), OK);
    assert_eq!(reaches(&mut pair, None, remote, 8), NO, "another queue pair of the same domain");
    // Nor may another end it, and what it tried costs that one its connection.
    let (_other_a, other_b) = connection(&pair, pair.b.pd);
    let invalidate = SendRequest::invalidate(9, key);
    assert_eq!(manage(&mut pair, &other_b, &invalidate), Status::MemoryManagementError);
    assert_eq!(reaches(&mut pair, Some(&qa), remote, 8), OK);
    // With the queue pair its windows go, and its region is free.
    let still = DestroyKeyError::WindowsBound { key: region.key, windows: 1 };
    assert_eq!(pair.b.hca.destroy_key(region.key).expect_err("bound"), still);
    drop(qb);
    pair.b.hca.destroy_key(region.key).expect("no window is bound any more");
    pair.b.hca.dealloc_window(key).expect("it is there");
}

#[test]
fn a_window_of_type_1_serves_its_whole_domain_until_it_is_bound_anew() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let key = window(&pair, WindowKind::One);
    assert_eq!(bound(&mut pair, part(key, &region)), Status::Success);
    assert_eq!(reaches(&mut pair, None, at(key, region.base + AT), 8), OK);
    let other = pair.b.region_at(0x1000, 0, SIZE, ALL, pair.b.pd);
    assert_eq!(
        bound(&mut pair, part(next(key), &other)),
        Status::Success,
        "type 1 is bound over its binding"
    );
    assert_eq!(reaches(&mut pair, None, at(key, region.base + AT), 8), NO, "the binding of before");
    assert_eq!(reaches(&mut pair, None, at(next(key), 0x1000 + AT), 8), OK);
    pair.b.hca.destroy_key(region.key).expect("no window is bound to it any more");
    let unbind = WindowBind { length: 0, ..part(key, &other) };
    assert_eq!(bound(&mut pair, unbind), Status::Success);
    assert_eq!(reaches(&mut pair, None, at(key, 0x1000 + AT), 8), NO, "bound to nothing");
    pair.b.hca.destroy_key(other.key).expect("no window is bound to it any more");
}

#[test]
fn an_invalidated_window_reaches_nothing_and_can_be_bound_again() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let key = window(&pair, WindowKind::TwoB);
    let (qa, qb) = (Arc::clone(&pair.qa), Arc::clone(&pair.qb));
    let mut name = key;
    for _ in 0..300 {
        name = next(name);
        assert_eq!(manage(&mut pair, &qb, &bind(part(name, &region))), Status::Success);
        assert_eq!(manage(&mut pair, &qb, &SendRequest::invalidate(5, name)), Status::Success);
    }
    assert_eq!(
        manage(&mut pair, &qb, &SendRequest::invalidate(5, name)),
        Status::Success,
        "it is free already"
    );
    assert_eq!(reaches(&mut pair, None, at(name, region.base + AT), 8), NO);
    assert_eq!(manage(&mut pair, &qb, &bind(part(key, &region))), Status::Success);
    assert_eq!(reaches(&mut pair, Some(&qa), at(key, region.base + AT), 8), OK);
}

#[test]
fn a_zero_based_window_counts_from_its_own_first_byte() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let key = window(&pair, WindowKind::TwoB);
    let access = Access::REMOTE_WRITE | Access::ZERO_BASED;
    assert_eq!(bound(&mut pair, WindowBind { access, ..part(key, &region) }), Status::Success);
    let local = pair.a.region(SIZE);
    pair.a.fill(&local, 0, &pattern(4, LENGTH));
    let sges = [local.sge(0, LENGTH as u32)];
    let write = SendRequest::write(2, &sges, at(key, 0));
    assert_eq!(pair.ask(&write), Status::Success);
    assert_eq!(pair.b.bytes(&region, AT, LENGTH), pattern(4, LENGTH));
}

#[test]
fn what_the_specification_forbids_binds_nothing_and_ends_the_queue_pair() {
    type Change = fn(&mut Pair, WindowBind) -> WindowBind;
    let two: Change = |pair, bind| WindowBind { key: window(pair, WindowKind::TwoB), ..bind };
    let changes: [(&str, Change); 12] = [
        ("past the region", |_, bind| WindowBind { length: SIZE - AT + 1, ..bind }),
        ("before the region", |_, bind| WindowBind { address: RegionAddr(bind.address.0 - AT - 1), ..bind }),
        ("a length that wraps", |_, bind| WindowBind { length: u64::MAX, ..bind }),
        ("no such region", |_, bind| WindowBind { region: Key(bind.region.0 ^ 1), ..bind }),
        ("no such window", |_, bind| WindowBind { key: Key(bind.key.0 ^ 0x100), ..bind }),
        ("a region that is no window", |_, bind| WindowBind { key: bind.region, ..bind }),
        ("a region that allows none", |pair, bind| {
            let access = ALL.difference(Access::WINDOW_BIND);
            let region = pair.b.region_at(bind.address.0, 0, SIZE, access, pair.b.pd);
            WindowBind { region: region.key, ..bind }
        }),
        ("writing where the owner may not", |pair, bind| {
            let access = Access::REMOTE_READ | Access::WINDOW_BIND;
            let region = pair.b.region_at(bind.address.0, 0, SIZE, access, pair.b.pd);
            WindowBind { region: region.key, ..bind }
        }),
        ("a region of another domain", |pair, bind| {
            let other = pair.b.hca.alloc_pd().expect("a domain");
            let region = pair.b.region_at(bind.address.0, 0, SIZE, ALL, other);
            WindowBind { region: region.key, ..bind }
        }),
        ("a window of another domain", |pair, bind| {
            let pd = pair.b.hca.alloc_pd().expect("a domain");
            let key = pair.b.hca.alloc_window(WindowSpec { pd, kind: WindowKind::One }).expect("a window");
            WindowBind { key, ..bind }
        }),
        ("local rights", |_, bind| WindowBind { access: Access::LOCAL_WRITE, ..bind }),
        ("type 1, zero based", |_, bind| WindowBind { access: bind.access | Access::ZERO_BASED, ..bind }),
    ];
    for (what, change) in changes {
        let mut pair = Pair::new(config());
        let region = pair.b.region(SIZE);
        let request = part(window(&pair, WindowKind::One), &region);
        let request = change(&mut pair, request);
        assert_eq!(bound(&mut pair, request), Status::MemoryManagementError, "{what}");
        let (key, address) = (request.key, request.address.0);
        if key != region.key {
            assert_eq!(reaches(&mut pair, None, at(key, address), 8), NO, "{what}");
        }
        pair.b.hca.destroy_key(region.key).expect("no window is bound");
    }
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let request = two(&mut pair, part(Key(0), &region));
    assert_eq!(bound(&mut pair, request), Status::Success);
    assert_eq!(bound(&mut pair, request), Status::MemoryManagementError, "type 2 is bound when free only");
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let request = two(&mut pair, part(Key(0), &region));
    let nothing = WindowBind { length: 0, ..request };
    assert_eq!(bound(&mut pair, nothing), Status::MemoryManagementError, "type 2 goes by invalidation");
}

#[test]
fn windows_of_type_1_are_not_invalidated() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let key = window(&pair, WindowKind::One);
    assert_eq!(bound(&mut pair, part(key, &region)), Status::Success);
    let qb = Arc::clone(&pair.qb);
    assert_eq!(manage(&mut pair, &qb, &SendRequest::invalidate(5, key)), Status::MemoryManagementError);
    assert_eq!(reaches(&mut pair, None, at(key, region.base + AT), 8), OK);
}

#[test]
fn a_window_is_no_local_key() {
    for scatter in [false, true] {
        let mut pair = Pair::new(config());
        let (here, there) = (pair.b.region(SIZE), pair.a.region(SIZE));
        let key = window(&pair, WindowKind::One);
        assert_eq!(bound(&mut pair, part(key, &here)), Status::Success);
        let sges = [hw_model::hca::Sge { key, address: RegionAddr(here.base + AT), length: 8 }];
        let request = match scatter {
            true => SendRequest::read(1, &sges, there.remote(0)),
            false => SendRequest::write(1, &sges, there.remote(0)),
        };
        let qb = Arc::clone(&pair.qb);
        assert_eq!(manage(&mut pair, &qb, &request), Status::LocalProtectionError);
    }
}

#[test]
fn a_region_with_windows_stays_as_it_is_and_when_it_is_revoked_they_go_too() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let keys = [window(&pair, WindowKind::One), window(&pair, WindowKind::TwoB)];
    for key in keys {
        assert_eq!(bound(&mut pair, part(key, &region)), Status::Success);
    }
    let hca = Arc::clone(&pair.b.hca);
    let bound_twice = DestroyKeyError::WindowsBound { key: region.key, windows: 2 };
    assert_eq!(hca.destroy_key(region.key).expect_err("bound"), bound_twice);
    let change = KeyChange { access: Some(Access::empty()), ..KeyChange::default() };
    let rereg = ReregKeyError::WindowsBound { key: region.key, windows: 2 };
    assert_eq!(hca.rereg_key(region.key, change).expect_err("bound"), rereg);
    let qa = Arc::clone(&pair.qa);
    for key in keys {
        assert_eq!(
            reaches(&mut pair, Some(&qa), at(key, region.base + AT), 8),
            OK,
            "a refusal changes nothing"
        );
    }
    hca.revoke_key(region.key).expect("it is there");
    for key in keys {
        assert_eq!(reaches(&mut pair, None, at(key, region.base + AT), 8), NO);
    }
    // What is left is two free windows: they can be bound again.
    let other = pair.b.region(SIZE);
    let (_qa, qb) = connection(&pair, pair.b.pd);
    for key in keys {
        assert_eq!(manage(&mut pair, &qb, &bind(part(key, &other))), Status::Success);
    }
    keys.into_iter().for_each(|key| hca.dealloc_window(key).expect("there, bound or not"));
    assert_eq!(hca.dealloc_window(keys[0]), Err(UnknownKey { key: keys[0] }));
    hca.destroy_key(other.key).expect("its windows are gone");
}

#[test]
fn a_page_missing_under_a_window_is_asked_for_by_the_regions_key() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let key = window(&pair, WindowKind::TwoB);
    let access = Access::REMOTE_WRITE | Access::ZERO_BASED;
    assert_eq!(bound(&mut pair, WindowBind { access, ..part(key, &region) }), Status::Success);
    region.absent(1);
    let local = pair.a.region(SIZE);
    pair.a.fill(&local, 0, &pattern(5, LENGTH));
    pair.qa.post_send(&SendRequest::write(2, &[local.sge(0, LENGTH as u32)], at(key, 0))).expect("posted");
    let mut faults = 0;
    pair.run(|_, fault| {
        assert_eq!(fault.key, region.key);
        let page = region.page_of(fault);
        assert_eq!(page, 1);
        region.present(page, true);
        faults += 1;
        FaultOutcome::Resolved
    });
    assert_eq!(pair.a.take()[0].status, Status::Success);
    assert!(faults > 0);
    assert_eq!(pair.b.bytes(&region, AT, LENGTH), pattern(5, LENGTH));
}

/// 100,000 keys of one region, one after the other, and as many bindings of one window: none of the earlier ones reaches
/// it, and none of those guessed.
#[test]
fn no_earlier_key_and_no_guessed_one_reaches_the_memory() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let hca = Arc::clone(&pair.b.hca);
    let mut spec = hca.destroy_key(region.key).expect("there");
    let mut earlier = vec![region.key];
    for _ in 0..100_000 {
        let key = hca.create_key(spec).expect("a key");
        earlier.push(key);
        spec = hca.destroy_key(key).expect("there");
    }
    let live = hca.create_key(spec).expect("a key");
    assert!(!earlier[earlier.len() / 2..].contains(&live), "a key comes back out of the quarantine");
    // Neighbours of the live key, and a sample of all that it was: each over a connection of its own.
    let guesses = (0..32).map(|bit| Key(live.0 ^ 1 << bit));
    let sample = earlier.iter().copied().filter(|key| *key != live).step_by(997);
    for key in sample.chain(guesses) {
        assert_eq!(reaches(&mut pair, None, Remote { key, ..region.remote(0) }, 8), NO, "{key:?}");
    }
    assert_eq!(reaches(&mut pair, None, Remote { key: live, ..region.remote(0) }, 8), OK);
}
