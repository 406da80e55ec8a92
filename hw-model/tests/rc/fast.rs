//! Fast registration: a key has memory exactly between its register and its invalidate request, and only by its newest name.

use crate::world::{ALL, Host, Pair, Region, config, pattern};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::fault_plan::{Action, FaultPlan, Points, Rule};
use hw_model::hca::{
    Access, CreateKeyError, FastKeySpec, FastMap, FastMemory, Hca, HcaConfig, Key, KeySpec, MapKeyError,
    PageList, PathMtu, QpSpec, QpState, Remote, SendRequest, Sge, Status, UnknownKey,
};
use hw_model::link::{Fabric, FaultyLink, LossRates};
use hw_model::sync::Arc;

const SIZE: u64 = 3 * PAGE_SIZE;
const BASE: u64 = 0x1234_5678_9000;

/// A key for fast registration at `host`, and the memory of `region` ready to be registered for it.
fn mapped(host: &Host, region: &Region) -> Key {
    let key = host.hca.create_fast_key(FastKeySpec { pd: host.pd, max_entries: 8 }).expect("a key");
    host.hca.map_fast_key(key, map(region)).expect("it has room");
    key
}

fn map(region: &Region) -> FastMap {
    let memory = FastMemory::Pages { pages: Arc::clone(&region.pages), first_page_offset: 0, length: SIZE };
    FastMap { address: RegionAddr(BASE), memory }
}

fn at(key: Key) -> Remote {
    Remote { key, address: RegionAddr(BASE) }
}

/// The same index with the next key byte (`ib_inc_rkey`).
fn next(key: Key) -> Key {
    Key(key.0 & !0xff | (key.0 + 1) & 0xff)
}

/// `qb` registers or invalidates.
fn manage(pair: &mut Pair, request: &SendRequest<'_>) -> Status {
    pair.qb.post_send(request).expect("posted");
    pair.run_without_faults();
    let completions = pair.b.take();
    assert_eq!(completions.len(), 1, "one request, one completion: {completions:?}");
    completions[0].status
}

#[test]
fn a_registered_key_reaches_its_memory_in_both_directions() {
    let mut pair = Pair::new(config());
    let (local, region) = (pair.a.region(SIZE), pair.b.region(SIZE));
    let key = mapped(&pair.b, &region);
    assert_eq!(manage(&mut pair, &SendRequest::register(1, next(key), ALL)), Status::Success);
    pair.a.fill(&local, 0, &pattern(1, SIZE));
    let sges = [local.sge(0, SIZE as u32)];
    assert_eq!(pair.ask(&SendRequest::write(2, &sges, at(next(key)))), Status::Success);
    assert!(pair.b.bytes(&region, 0, SIZE) == pattern(1, SIZE), "the data is not where the list says");
    pair.b.fill(&region, 0, &pattern(2, SIZE));
    assert_eq!(pair.ask(&SendRequest::read(3, &sges, at(next(key)))), Status::Success);
    assert_eq!(pair.a.bytes(&local, 0, SIZE), pattern(2, SIZE));
}

/// One peer request of `SIZE` bytes by `key` in a new connection: it is refused and changes nothing.
fn reaches_nothing(pair: &mut Pair, region: &Region, key: Key) {
    let before = pair.b.bytes(region, 0, SIZE);
    let local = pair.a.region(SIZE);
    pair.a.fill(&local, 0, &pattern(9, SIZE));
    let (qa, qb) = (pair.a.qp(), pair.b.qp());
    crate::world::connect(&qa, &qb);
    let sges = [local.sge(0, SIZE as u32)];
    qa.post_send(&SendRequest::write(4, &sges, at(key))).expect("posted");
    pair.run_without_faults();
    let completions = pair.a.take();
    assert_eq!(completions.len(), 1);
    assert_eq!(completions[0].status, Status::RemoteAccessError, "{key:?} reaches memory");
    assert!(pair.b.bytes(region, 0, SIZE) == before, "{key:?} moved bytes");
}

#[test]
fn a_key_reaches_nothing_before_its_registration_after_its_end_and_by_an_old_name() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let first = mapped(&pair.b, &region);
    reaches_nothing(&mut pair, &region, first);
    assert_eq!(manage(&mut pair, &SendRequest::register(1, first, ALL)), Status::Success);
    reaches_nothing(&mut pair, &region, next(first));
    assert_eq!(manage(&mut pair, &SendRequest::invalidate(2, first)), Status::Success);
    reaches_nothing(&mut pair, &region, first);
    assert_eq!(manage(&mut pair, &SendRequest::invalidate(3, first)), Status::Success, "it is free already");
    pair.b.hca.map_fast_key(first, map(&region)).expect("it has room");
    reaches_nothing(&mut pair, &region, first);
    assert_eq!(manage(&mut pair, &SendRequest::register(4, next(first), ALL)), Status::Success);
    reaches_nothing(&mut pair, &region, first);
    pair.b.hca.destroy_fast_key(first).expect("by any of its names");
    reaches_nothing(&mut pair, &region, next(first));
    assert_eq!(pair.b.hca.destroy_fast_key(first), Err(UnknownKey { key: first }.into()));
}

#[test]
fn a_registration_allows_what_it_says_and_no_more() {
    for (access, status) in [
        (Access::LOCAL_WRITE | Access::REMOTE_WRITE, Status::Success),
        (Access::REMOTE_READ, Status::RemoteAccessError),
    ] {
        let mut pair = Pair::new(config());
        let (local, region) = (pair.a.region(SIZE), pair.b.region(SIZE));
        let key = mapped(&pair.b, &region);
        assert_eq!(manage(&mut pair, &SendRequest::register(1, key, access)), Status::Success);
        let sges = [local.sge(0, SIZE as u32)];
        assert_eq!(pair.ask(&SendRequest::write(2, &sges, at(key))), status, "{access:?}");
    }
}

#[test]
fn what_is_not_allowed_fails_the_request_and_registers_nothing() {
    type Make = fn(&mut Pair, Key) -> Key;
    type Ask = fn(Key) -> SendRequest<'static>;
    let register = |key| SendRequest::register(7, key, ALL);
    let invalidate = |key| SendRequest::invalidate(7, key);
    let twice: Make = |pair, key| {
        assert_eq!(manage(pair, &SendRequest::register(1, key, Access::empty())), Status::Success);
        key
    };
    let ordinary: Make = |pair, _| pair.b.region(SIZE).key;
    let unmapped: Make = |pair, _| {
        let spec = FastKeySpec { pd: pair.b.pd, max_entries: 8 };
        pair.b.hca.create_fast_key(spec).expect("a key")
    };
    let foreign: Make = |pair, _| {
        let pd = pair.b.hca.alloc_pd().expect("a domain");
        let key = pair.b.hca.create_fast_key(FastKeySpec { pd, max_entries: 8 }).expect("a key");
        let memory = pair.b.region(SIZE);
        pair.b.hca.map_fast_key(key, map(&memory)).expect("room");
        key
    };
    let never: Make = |_, key| Key(key.0 ^ 0x100);
    let other_byte: Make = |pair, key| next(twice_of(pair, key));
    fn twice_of(pair: &mut Pair, key: Key) -> Key {
        assert_eq!(manage(pair, &SendRequest::register(1, key, Access::empty())), Status::Success);
        key
    }
    let cases: [(&str, Make, Ask); 9] = [
        ("register a registered key", twice, register),
        ("register an ordinary key", ordinary, register),
        ("register without memory", unmapped, register),
        ("register in another domain", foreign, register),
        ("register a key never given", never, register),
        (
            "remote writing without local",
            |_, key| key,
            |key| SendRequest::register(7, key, Access::REMOTE_WRITE),
        ),
        ("invalidate an ordinary key", ordinary, invalidate),
        ("invalidate in another domain", foreign, invalidate),
        ("invalidate by another name", other_byte, invalidate),
    ];
    for (what, make, request) in cases {
        let mut pair = Pair::new(config());
        let region = pair.b.region(SIZE);
        let fast = mapped(&pair.b, &region);
        let key = make(&mut pair, fast);
        let before = pair.b.hca.live_objects();
        assert_eq!(manage(&mut pair, &request(key)), Status::MemoryManagementError, "{what}");
        assert_eq!(pair.qb.state(), QpState::Error, "{what}");
        assert_eq!(pair.b.hca.live_objects(), before, "{what}");
        reaches_nothing(&mut pair, &region, fast);
    }
}

#[test]
fn memory_that_does_not_fit_a_key_is_refused_before_any_request() {
    let pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let hca = &pair.b.hca;
    let key = hca.create_fast_key(FastKeySpec { pd: pair.b.pd, max_entries: 2 }).expect("a key");
    assert_eq!(hca.map_fast_key(key, map(&region)), Err(MapKeyError::TooManyEntries { entries: 3, max: 2 }));
    let pages = Arc::new(PageList::new(2).expect("a list"));
    let memory = FastMemory::Pages { pages, first_page_offset: 1, length: 2 * PAGE_SIZE };
    let short = CreateKeyError::ListTooShort { entries: 2, needed: 3 };
    assert_eq!(hca.map_fast_key(key, FastMap { memory, ..map(&region) }), Err(short.into()));
    let ordinary = UnknownKey { key: region.key };
    assert_eq!(hca.map_fast_key(region.key, map(&region)), Err(ordinary.into()));
    assert_eq!(hca.destroy_fast_key(region.key), Err(ordinary.into()));
    assert_eq!(hca.destroy_key(key).expect_err("another sort of key"), UnknownKey { key }.into());
    let sges = [Sge { key, address: RegionAddr(0), length: 1 }];
    let request = SendRequest { local: &sges, ..SendRequest::register(1, key, ALL) };
    assert!(pair.b.qp().post_send(&request).is_err(), "a registration has no data");
}

/// The order of one queue pair is all that software relies on: no waiting between the requests, and packets get lost.
#[test]
fn requests_posted_together_are_carried_out_in_order_whatever_is_lost() {
    for seed in 0..40 {
        let fabric = Fabric::new();
        let rates = LossRates { drop: 90, duplicate: 60, reorder: 60, ..LossRates::default() };
        let [a, b] = [fabric.port(), fabric.port()].map(|port| Box::new(FaultyLink::new(port, rates, seed)));
        let config = HcaConfig { path_mtu: PathMtu::new(256).expect("an MTU"), retry_count: 100, ..config() };
        let mut pair = Pair::over(config, a, b);
        let (remote, source, sink) = (pair.b.region(4 * SIZE), pair.a.region(SIZE), pair.a.region(SIZE));
        let (out, back) = (mapped(&pair.a, &source), mapped(&pair.a, &sink));
        pair.a.fill(&source, 0, &pattern(seed, SIZE));
        let sge = |key| [Sge { key, address: RegionAddr(BASE), length: SIZE as u32 }];
        let (out_sge, back_sge) = (sge(out), sge(next(back)));
        let requests = [
            SendRequest::register(0, out, Access::empty()),
            SendRequest::write(1, &out_sge, remote.remote(SIZE)),
            SendRequest::register(2, next(back), Access::LOCAL_WRITE),
            SendRequest::read(3, &back_sge, remote.remote(SIZE)),
            SendRequest::invalidate(4, out),
            SendRequest::invalidate(5, next(back)),
        ];
        for request in &requests {
            pair.qa.post_send(request).expect("posted");
        }
        pair.run_without_faults();
        let ended: Vec<_> = pair.a.take().iter().map(|done| (done.id.0, done.status)).collect();
        assert_eq!(ended, [0, 1, 2, 3, 4, 5].map(|id| (id, Status::Success)), "seed {seed}");
        assert_eq!(pair.a.bytes(&sink, 0, SIZE), pattern(seed, SIZE), "seed {seed}");
        // Both are free again: what comes after cannot use them.
        let status = pair.ask(&SendRequest::write(6, &out_sge, remote.remote(0)));
        assert_eq!(status, Status::LocalProtectionError);
    }
}

#[test]
fn nothing_after_a_failed_registration_is_carried_out() {
    let mut pair = Pair::new(config());
    let (local, region) = (pair.a.region(SIZE), pair.b.region(SIZE));
    let sges = [local.sge(0, SIZE as u32)];
    pair.a.fill(&local, 0, &pattern(1, SIZE));
    let unknown = Key(local.key.0 ^ 0x100);
    pair.qa.post_send(&SendRequest::write(0, &sges, region.remote(0))).expect("posted");
    pair.qa.post_send(&SendRequest::register(1, unknown, ALL)).expect("posted");
    pair.qa.post_send(&SendRequest::invalidate(2, unknown)).expect("posted");
    pair.run_without_faults();
    let ended: Vec<_> = pair.a.take().iter().map(|done| done.status).collect();
    assert_eq!(ended, [Status::Success, Status::MemoryManagementError, Status::FlushError]);
    assert_eq!(pair.b.bytes(&region, 0, SIZE), pattern(1, SIZE), "what came before was done");
}

#[test]
fn a_list_of_large_pages_leads_to_every_byte() {
    let mut pair = Pair::new(config());
    // Pages of 64 KiB: one from frame 256 on, one from frame 16 on.
    let pages = Arc::new(PageList::with_page_shift(2, 16).expect("a list"));
    let frame = pair.b.region_at(0, 0, 512 * PAGE_SIZE, ALL, pair.b.pd);
    pages.store(0, frame.entry(256, true));
    pages.store(1, frame.entry(16, true));
    let (offset, length) = (50_000, 60_000);
    let (pd, access) = (pair.b.pd, ALL);
    let spec = KeySpec { pd, access, address: RegionAddr(BASE), length, first_page_offset: offset, pages };
    let beyond = KeySpec { first_page_offset: 1 << 16, ..spec.clone() };
    let refused = pair.b.hca.create_key(beyond);
    assert_eq!(refused, Err(CreateKeyError::OffsetBeyondPage { offset: 1 << 16 }));
    let key = pair.b.hca.create_key(spec).expect("a key");
    let local = pair.a.region(length);
    pair.a.fill(&local, 0, &pattern(3, length));
    let sges = [local.sge(0, length as u32)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, at(key))), Status::Success);
    let head = (1 << 16) - offset;
    let got = [
        pair.b.bytes(&frame, 256 * PAGE_SIZE + offset, head),
        pair.b.bytes(&frame, 16 * PAGE_SIZE, length - head),
    ];
    assert!(got.concat() == pattern(3, length), "the entry or the offset in its page is wrong");
}

#[test]
fn a_request_that_the_device_fails_leaves_the_key_as_it_was() {
    let rule = Rule::nth("hca.memory_management", 1, Action::Fail);
    let plan = FaultPlan::new(1, vec![rule]);
    let fabric = Fabric::new();
    let host = Host::new(Box::new(fabric.port()), config(), 64);
    let peer = Host::new(Box::new(fabric.port()), config(), 64);
    let port = host.hca.port().clone();
    let hca = Hca::with_points(config(), port, Box::new(fabric.port()), Points::with(&plan)).expect("an HCA");
    let pd = hca.alloc_pd().expect("a domain");
    let cq = hca.create_cq(8).expect("a queue");
    let region = host.region(SIZE);
    let key = hca.create_fast_key(FastKeySpec { pd, max_entries: 8 }).expect("a key");
    hca.map_fast_key(key, map(&region)).expect("room");
    for status in [Status::MemoryManagementError, Status::Success] {
        let qp = hca.create_qp(&QpSpec::new(pd, &cq)).expect("a queue pair");
        crate::world::connect(&qp, &peer.qp());
        qp.post_send(&SendRequest::register(1, key, ALL)).expect("posted");
        for _ in 0..16 {
            hca.step_engine(0, hw_model::hca::Time(0));
        }
        let mut done = Vec::new();
        cq.poll(&mut done, 8).expect("no overrun");
        assert_eq!(done.iter().map(|done| done.status).collect::<Vec<_>>(), [status]);
    }
}
