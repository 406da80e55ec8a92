//! What must not be possible is not, ends with the status that the specification names, and moves not one byte.

use crate::world::{ALL, Pair, config, pattern};
use hw_model::addr::RegionAddr;
use hw_model::hca::{
    Access, CreateKeyError, CreateQpError, HcaConfig, Key, KeySpec, Limits, ModifyQpError, PageList, PathMtu,
    PdError, PostError, QpChange, QpSpec, QpState, Remote, SendRequest, Sge, Status, Transport, UnknownKey,
};
use hw_model::sync::Arc;

const SIZE: u64 = 10_000;

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(1024).expect("an MTU"), ..config() }
}

/// A write and a read of `SIZE` bytes at `remote` both end with `status`, and nothing changed on either side.
fn refused(make: impl Fn(&Pair) -> (Remote, u64), status: Status) {
    for write in [true, false] {
        let mut pair = Pair::new(small_packets());
        let local = pair.a.region(SIZE + 4096);
        pair.a.fill(&local, 0, &pattern(1, SIZE));
        let (remote, length) = make(&pair);
        let before: Vec<u8> = all_of(&pair.b);
        let sges = [local.sge(0, length as u32)];
        let request = match write {
            true => SendRequest::write(1, &sges, remote),
            false => SendRequest::read(1, &sges, remote),
        };
        assert_eq!(pair.ask(&request), status, "write: {write}");
        assert!(all_of(&pair.b) == before, "a refused request moved bytes");
        assert_eq!(pair.a.bytes(&local, 0, SIZE), pattern(1, SIZE), "a refused read moved bytes");
        assert_eq!((pair.qa.state(), pair.qb.state()), (QpState::Error, QpState::Error));
    }
}

fn all_of(host: &crate::world::Host) -> Vec<u8> {
    let mut out = vec![0; 64 * 4096];
    host.memory.load(0, &mut out);
    out
}

#[test]
fn one_byte_past_the_end_moves_no_byte() {
    refused(|pair| (pair.b.region(SIZE).remote(1), SIZE), Status::RemoteAccessError);
}

#[test]
fn one_byte_before_the_start_moves_no_byte() {
    refused(|pair| (pair.b.region(SIZE).remote(u64::MAX), SIZE), Status::RemoteAccessError);
}

#[test]
fn an_address_that_wraps_moves_no_byte() {
    let wrapping = |pair: &Pair| {
        let region = pair.b.region(SIZE);
        (Remote { key: region.key, address: RegionAddr(u64::MAX - 10) }, SIZE)
    };
    refused(wrapping, Status::RemoteAccessError);
}

#[test]
fn a_key_that_was_never_given_reaches_nothing() {
    let wrong = |pair: &Pair| {
        let region = pair.b.region(SIZE);
        (Remote { key: Key(region.key.0 ^ 1), ..region.remote(0) }, SIZE)
    };
    refused(wrong, Status::RemoteAccessError);
}

#[test]
fn a_destroyed_key_reaches_nothing() {
    let destroyed = |pair: &Pair| {
        let region = pair.b.region(SIZE);
        pair.b.hca.destroy_key(region.key).expect("a live key");
        let again = pair.b.hca.destroy_key(region.key).expect_err("it is gone");
        assert_eq!(again, UnknownKey { key: region.key }.into());
        (region.remote(0), SIZE)
    };
    refused(destroyed, Status::RemoteAccessError);
}

#[test]
fn a_key_of_another_protection_domain_reaches_nothing() {
    let other = |pair: &Pair| {
        let pd = pair.b.hca.alloc_pd().expect("a domain");
        (pair.b.region_at(0x1000, 0, SIZE, ALL, pd).remote(0), SIZE)
    };
    refused(other, Status::RemoteAccessError);
}

#[test]
fn a_key_without_remote_rights_reaches_nothing() {
    let local_only =
        |pair: &Pair| (pair.b.region_at(0x1000, 0, SIZE, Access::LOCAL_WRITE, pair.b.pd).remote(0), SIZE);
    refused(local_only, Status::RemoteAccessError);
}

#[test]
fn reading_rights_do_not_allow_writing_nor_the_other_way() {
    let mut pair = Pair::new(small_packets());
    let local = pair.a.region(SIZE);
    let sges = [local.sge(0, 100)];
    let read_only = pair.b.region_at(0, 0, SIZE, Access::REMOTE_READ, pair.b.pd);
    assert_eq!(pair.ask(&SendRequest::read(1, &sges, read_only.remote(0))), Status::Success);
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, read_only.remote(0))), Status::RemoteAccessError);
    let mut pair = Pair::new(small_packets());
    let local = pair.a.region(SIZE);
    let sges = [local.sge(0, 100)];
    let write_only = pair.b.region_at(0, 0, SIZE, Access::REMOTE_WRITE | Access::LOCAL_WRITE, pair.b.pd);
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, write_only.remote(0))), Status::Success);
    assert_eq!(pair.ask(&SendRequest::read(1, &sges, write_only.remote(0))), Status::RemoteAccessError);
}

#[test]
fn a_queue_pair_that_allows_no_remote_access_answers_invalid_request() {
    for write in [true, false] {
        let mut pair = Pair::new(small_packets());
        let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
        let spec = QpSpec { access: Access::empty(), ..QpSpec::new(pair.b.pd, &pair.b.cq) };
        pair.qa = pair.a.qp();
        pair.qb = pair.b.hca.create_qp(&spec).expect("a queue pair");
        crate::world::connect(&pair.qa, &pair.qb);
        let sges = [local.sge(0, 100)];
        let request = match write {
            true => SendRequest::write(1, &sges, remote.remote(0)),
            false => SendRequest::read(1, &sges, remote.remote(0)),
        };
        assert_eq!(pair.ask(&request), Status::RemoteInvalidRequestError);
    }
}

#[test]
fn local_keys_are_checked_too() {
    type Wrong = fn(&Pair, Sge) -> Sge;
    let cases: [(Wrong, bool); 5] = [
        (|_, sge| Sge { key: Key(sge.key.0 ^ 1), ..sge }, true),
        (|_, sge| Sge { length: SIZE as u32 + 1, ..sge }, true),
        (|_, sge| Sge { address: RegionAddr(sge.address.0 - 1), ..sge }, true),
        (
            |pair, _| {
                let pd = pair.a.hca.alloc_pd().expect("a domain");
                pair.a.region_at(0, 0, SIZE, ALL, pd).sge(0, 100)
            },
            true,
        ),
        // Landing a read needs the right to write locally; sending does not need any.
        (|pair, _| pair.a.region_at(0, 0, SIZE, Access::empty(), pair.a.pd).sge(0, 100), false),
    ];
    for (wrong, for_writes_too) in cases {
        for write in [true, false] {
            let mut pair = Pair::new(small_packets());
            let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE + 4096));
            let sges = [wrong(&pair, local.sge(0, SIZE as u32))];
            let request = match write {
                true => SendRequest::write(1, &sges, remote.remote(0)),
                false => SendRequest::read(1, &sges, remote.remote(0)),
            };
            let expected =
                if write && !for_writes_too { Status::Success } else { Status::LocalProtectionError };
            assert_eq!(pair.ask(&request), expected);
        }
    }
}

#[test]
fn a_message_without_data_needs_no_valid_key() {
    let mut pair = Pair::new(config());
    let remote = Remote { key: Key(1), address: RegionAddr(u64::MAX) };
    assert_eq!(pair.ask(&SendRequest::write(1, &[], remote)), Status::Success);
    assert_eq!(pair.ask(&SendRequest::read(2, &[], remote)), Status::Success);
}

#[test]
fn what_was_asked_before_a_refused_request_still_succeeds_and_what_comes_after_is_flushed() {
    let mut pair = Pair::new(small_packets());
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.b.fill(&remote, 0, &pattern(2, SIZE));
    let sges = [local.sge(0, SIZE as u32)];
    let beyond = remote.remote(1);
    let requests = [
        SendRequest::write(1, &sges[..0], remote.remote(0)),
        SendRequest::read(2, &sges, remote.remote(0)),
        SendRequest::write(3, &sges, beyond),
        SendRequest::read(4, &sges, remote.remote(0)),
        SendRequest { signaled: false, ..SendRequest::write(5, &sges, remote.remote(0)) },
    ];
    pair.qa.post_send_list(&requests).expect("posted");
    pair.run_without_faults();
    pair.qa
        .post_send(&SendRequest::write(6, &sges, remote.remote(0)))
        .expect("the error state takes requests");
    pair.run_without_faults();
    let ends: Vec<_> = pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
    let flushed = Status::FlushError;
    let access = Status::RemoteAccessError;
    let success = Status::Success;
    assert_eq!(ends, [(1, success), (2, success), (3, access), (4, flushed), (5, flushed), (6, flushed)]);
    assert_eq!(pair.a.bytes(&local, 0, SIZE), pattern(2, SIZE), "the read before the refusal is whole");
    assert_eq!(pair.qa.outstanding(), 0);
}

#[test]
fn posting_says_what_is_wrong() {
    let limits = Limits { message_bytes: 1 << 20, ..Limits::default() };
    let pair = Pair::new(HcaConfig { limits, ..config() });
    let local = pair.a.region(4096);
    let spec = QpSpec { max_send_requests: 2, max_sges: 1, ..QpSpec::new(pair.a.pd, &pair.a.cq) };
    let qp = pair.a.hca.create_qp(&spec).expect("a queue pair");
    let remote = local.remote(0);
    let one = [local.sge(0, 1)];
    let write = SendRequest::write(1, &one, remote);
    assert_eq!(qp.post_send(&write), Err(PostError::State { qpn: qp.qpn(), state: QpState::Reset }));
    qp.connect(pair.qb.address()).expect("connects");
    let two = [local.sge(0, 1); 2];
    let too_many = PostError::TooManySges { entries: 2, max: 1 };
    assert_eq!(qp.post_send(&SendRequest::write(1, &two, remote)), Err(too_many));
    let long = [local.sge(0, (1 << 20) + 1)];
    let too_long = PostError::TooLong { bytes: (1 << 20) + 1, max: 1 << 20 };
    assert_eq!(qp.post_send(&SendRequest::write(1, &long, remote)), Err(too_long));
    let full = PostError::QueueFull { capacity: 2 };
    assert_eq!(qp.post_send_list(&[write, write, write]), Err((2, full)));
    assert_eq!(qp.outstanding(), 2);
}

#[test]
fn objects_are_refused_for_what_is_wrong_with_them() {
    let pair = Pair::new(HcaConfig { limits: Limits { keys: 2, qps: 2, ..Limits::default() }, ..config() });
    let hca = &pair.a.hca;
    let pages = Arc::new(PageList::new(2).expect("a list"));
    let good = KeySpec {
        pd: pair.a.pd,
        access: ALL,
        address: RegionAddr(5),
        length: 8000,
        first_page_offset: 192,
        pages,
    };
    let bad = |change: fn(&mut KeySpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        hca.create_key(spec).expect_err("refused")
    };
    let too_short = CreateKeyError::ListTooShort { entries: 2, needed: 3 };
    assert_eq!(bad(|spec| spec.first_page_offset = 193), too_short);
    assert_eq!(bad(|spec| spec.first_page_offset = 4096), CreateKeyError::OffsetBeyondPage { offset: 4096 });
    let past_top = CreateKeyError::PastTop { address: RegionAddr(u64::MAX - 7998), length: 8000 };
    assert_eq!(bad(|spec| spec.address = RegionAddr(u64::MAX - 7998)), past_top);
    let past_top = CreateKeyError::PastTop { address: RegionAddr(0), length: u64::MAX };
    assert_eq!(bad(|spec| (spec.address, spec.length) = (RegionAddr(0), u64::MAX)), past_top);
    let needs = CreateKeyError::NeedsLocalWrite { access: Access::REMOTE_WRITE };
    assert_eq!(bad(|spec| spec.access = Access::REMOTE_WRITE), needs);
    let other =
        pair.b.hca.alloc_pd().and_then(|_| pair.b.hca.alloc_pd()).expect("a domain of the other device");
    let unknown = hca.create_key(KeySpec { pd: other, ..good.clone() });
    assert_eq!(unknown, Err(CreateKeyError::Pd(PdError::Unknown { pd: other })));
    let first = hca.create_key(good.clone()).expect("a key");
    let top = KeySpec { address: RegionAddr(u64::MAX - 7999), ..good.clone() };
    hca.create_key(top).expect("a region may end at the top");
    assert_eq!(hca.create_key(good.clone()), Err(CreateKeyError::TooMany { max: 2 }));
    assert_eq!(
        hca.dealloc_pd(pair.a.pd),
        Err(PdError::InUse { pd: pair.a.pd, uses: 3 }),
        "2 keys, 1 queue pair"
    );
    hca.destroy_key(first).expect("live");
    hca.create_key(good).expect("room again");

    let spec = QpSpec::new(pair.a.pd, &pair.b.cq);
    assert_eq!(hca.create_qp(&spec).expect_err("foreign queue"), CreateQpError::OtherDevice);
    let spec = QpSpec { max_sges: 99, ..QpSpec::new(pair.a.pd, &pair.a.cq) };
    assert_eq!(hca.create_qp(&spec).expect_err("too many"), CreateQpError::Sges { sges: 99, max: 32 });
    let _second = pair.a.qp();
    let spec = QpSpec::new(pair.a.pd, &pair.a.cq);
    assert_eq!(hca.create_qp(&spec).expect_err("too many"), CreateQpError::TooMany { max: 2 });
}

#[test]
fn an_illegal_transition_changes_nothing() {
    let pair = Pair::new(config());
    let (from, to) = (QpState::ReadyToSend, QpState::Init);
    let error = pair.qa.modify(&QpChange::to(to)).expect_err("ready to send is not reset");
    let transport = Transport::ReliableConnection;
    assert_eq!(error, ModifyQpError::IllegalTransition { from, to, transport });
    assert_eq!(pair.qa.state(), QpState::ReadyToSend);
}

#[test]
fn everything_that_was_made_is_gone_when_dropped() {
    let pair = Pair::new(config());
    let before = pair.a.hca.live_objects();
    let pd = pair.a.hca.alloc_pd().expect("a domain");
    let region = pair.a.region_at(0, 0, 4096, ALL, pd);
    let cq = pair.a.hca.create_cq(1).expect("a queue");
    let qp = pair.a.hca.create_qp(&QpSpec::new(pd, &cq)).expect("a queue pair");
    let during = pair.a.hca.live_objects();
    assert_eq!((during.pds, during.keys), (before.pds + 1, before.keys + 1));
    assert_eq!((during.cqs, during.qps), (before.cqs + 1, before.qps + 1));
    drop(cq);
    assert_eq!(pair.a.hca.live_objects().cqs, before.cqs + 1, "a queue pair keeps its completion queue");
    drop(qp);
    pair.a.hca.destroy_key(region.key).expect("live");
    pair.a.hca.dealloc_pd(pd).expect("unused");
    assert_eq!(pair.a.hca.live_objects(), before);
    assert_eq!(pair.a.hca.dealloc_pd(pd), Err(PdError::Unknown { pd }));
}
