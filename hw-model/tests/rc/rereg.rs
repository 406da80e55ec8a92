//! Reregistration: the key stays, what it reaches changes in one step, and a refused change changes nothing.

use crate::world::{ALL, Pair, Region, config, pattern};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{
    Access, CreateKeyError, KeyChange, KeyMemory, PdError, Remote, ReregKeyError, SendRequest, Status,
    UnknownKey,
};
use hw_model::sync::Arc;

const SIZE: u64 = 3 * PAGE_SIZE;

/// The memory of `region`, as a key that covers `length` bytes of it at `address`.
fn memory(region: &Region, address: u64, length: u64) -> KeyMemory {
    let pages = Arc::clone(&region.pages);
    KeyMemory { address: RegionAddr(address), length, first_page_offset: region.offset, pages }
}

/// A write of `length` bytes to `remote` over a connection of its own.
fn write(pair: &mut Pair, remote: Remote, length: u64) -> Status {
    let local = pair.a.region(SIZE);
    pair.a.fill(&local, 0, &pattern(7, length));
    let (qa, qb) = (pair.a.qp(), pair.b.qp());
    crate::world::connect(&qa, &qb);
    qa.post_send(&SendRequest::write(1, &[local.sge(0, length as u32)], remote)).expect("posted");
    pair.run_without_faults();
    pair.a.take()[0].status
}

#[test]
fn a_key_given_other_memory_reaches_that_and_no_longer_the_old() {
    let mut pair = Pair::new(config());
    let (old, new) = (pair.b.region(SIZE), pair.b.region(SIZE));
    let before = pair.b.bytes(&old, 0, SIZE);
    let change = KeyChange { memory: Some(memory(&new, 0x9000, PAGE_SIZE)), ..KeyChange::default() };
    let was = pair.b.hca.rereg_key(old.key, change).expect("a region's key");
    assert_eq!((was.address, was.length), (RegionAddr(old.base), SIZE));
    let at = |address| Remote { key: old.key, address: RegionAddr(address) };
    assert_eq!(write(&mut pair, at(0x9000), PAGE_SIZE), Status::Success);
    assert_eq!(pair.b.bytes(&new, 0, PAGE_SIZE), pattern(7, PAGE_SIZE));
    assert_eq!(write(&mut pair, at(0x9000), PAGE_SIZE + 1), Status::RemoteAccessError, "the new end");
    assert_eq!(write(&mut pair, old.remote(0), 8), Status::RemoteAccessError, "the old address");
    assert_eq!(pair.b.bytes(&old, 0, SIZE), before);
}

#[test]
fn rights_and_domain_change_alone_and_leave_the_memory() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let read_only = KeyChange { access: Some(Access::REMOTE_READ), ..KeyChange::default() };
    pair.b.hca.rereg_key(region.key, read_only).expect("a region's key");
    assert_eq!(write(&mut pair, region.remote(0), 8), Status::RemoteAccessError);
    let all = KeyChange { access: Some(ALL), ..KeyChange::default() };
    pair.b.hca.rereg_key(region.key, all).expect("a region's key");
    assert_eq!(write(&mut pair, region.remote(0), SIZE), Status::Success);

    let other = pair.b.hca.alloc_pd().expect("a domain");
    let moved = KeyChange { pd: Some(other), ..KeyChange::default() };
    pair.b.hca.rereg_key(region.key, moved).expect("a region's key");
    assert_eq!(write(&mut pair, region.remote(0), 8), Status::RemoteAccessError);
    assert_eq!(pair.b.hca.dealloc_pd(other), Err(PdError::InUse { pd: other, uses: 1 }));
    let back = KeyChange { pd: Some(pair.b.pd), ..KeyChange::default() };
    pair.b.hca.rereg_key(region.key, back).expect("a region's key");
    pair.b.hca.dealloc_pd(other).expect("nothing is in it any more");
    assert_eq!(write(&mut pair, region.remote(0), 8), Status::Success);
}

#[test]
fn a_refused_change_changes_nothing() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(SIZE);
    let other = pair.b.hca.alloc_pd().expect("a domain");
    let gone = pair.b.hca.alloc_pd().expect("a domain");
    pair.b.hca.dealloc_pd(gone).expect("empty");
    let hca = Arc::clone(&pair.b.hca);
    let change = |change| hca.rereg_key(region.key, change).expect_err("impossible");
    let long = KeyChange { memory: Some(memory(&region, 0, SIZE + 1)), ..KeyChange::default() };
    let short = CreateKeyError::ListTooShort { entries: 3, needed: 4 };
    assert_eq!(change(KeyChange { pd: Some(other), ..long }), ReregKeyError::Spec(short));
    let high = KeyChange { memory: Some(memory(&region, u64::MAX, 2)), ..KeyChange::default() };
    let past = CreateKeyError::PastTop { address: RegionAddr(u64::MAX), length: 2 };
    assert_eq!(change(high), ReregKeyError::Spec(past));
    let access = Access::REMOTE_WRITE;
    let no_local = KeyChange { access: Some(access), ..KeyChange::default() };
    assert_eq!(change(no_local), ReregKeyError::Spec(CreateKeyError::NeedsLocalWrite { access }));
    let nowhere = KeyChange { pd: Some(gone), access: Some(Access::empty()), memory: None };
    assert_eq!(change(nowhere), ReregKeyError::Pd(PdError::Unknown { pd: gone }));
    hca.dealloc_pd(other).expect("a refused change leaves nothing in the domain");
    assert_eq!(write(&mut pair, region.remote(0), SIZE), Status::Success);
    hca.destroy_key(region.key).expect("there");
    let unknown = ReregKeyError::Unknown(UnknownKey { key: region.key });
    assert_eq!(hca.rereg_key(region.key, KeyChange::default()).expect_err("gone"), unknown);
}
