//! The registration cache over real memory: memory that comes and goes at the same addresses while peers write by keys from
//! the cache.
//!
//! A key that was given out for memory that is gone must never be given out again, nor reach what came after it.

use crate::bed::{Bed, space};
use crate::checks::until;
use anypage::machine::MachineConfig;
use hw_model::hca::{Access, Key, OperationCode, Remote, Status};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};
use mr::{Cache, CacheConfig, RegisterOptions};
use odp::space::AddressSpace;
use odp::space::process::{OwnedMemory, ProcessSpace};
use std::collections::BTreeMap;

const SIZE: u64 = 64 << 10;
const ROUNDS: u64 = 150;

fn rights() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ
}

/// A connected pair, the near end's domain shared with a cache.
fn bed(space: &Arc<ProcessSpace>, config: CacheConfig) -> (Bed, Cache) {
    let memory = Arc::new(OwnedMemory::new(space, SIZE).expect("memory"));
    let bed = Bed::new(space, &memory.user_range(), RegisterOptions::on_demand(), &MachineConfig::default());
    let cache = Cache::new(Arc::clone(&bed.near.pd), Arc::clone(space) as _, config);
    (bed, cache)
}

#[test]
fn an_owner_may_drop_memory_that_a_cache_knows() {
    let space = space();
    let (bed, cache) = bed(&space, CacheConfig::default());
    let before = space.notifiers().stats().intervals;
    let memory = Arc::new(OwnedMemory::new(&space, SIZE).expect("memory"));
    let key = cache.get(&memory.user_range(), rights()).expect("a region").key();
    let gone = Arc::downgrade(&memory);
    drop(memory);
    assert_eq!(gone.strong_count(), 0, "the cache keeps the memory");
    // The object is there still, and its key: but it reaches nothing.
    let remote = Remote { key, address: bed.near.region.address() };
    assert_eq!(bed.far_does(OperationCode::Write, 0, 8, remote), Status::RemoteAccessError);
    cache.reap();
    assert!(until(|| space.notifiers().stats().intervals == before), "the region was not reaped");
}

#[test]
fn memory_that_went_while_it_was_leased_is_not_followed_to_what_comes_after_it() {
    let space = space();
    let (bed, cache) = bed(&space, CacheConfig::default());
    let memory = Arc::new(OwnedMemory::new(&space, SIZE).expect("memory"));
    let range = memory.user_range().range();
    let lease = cache.get(&memory.user_range(), rights()).expect("a region");
    drop(memory);
    // The same addresses, if the kernel gives them: that the old key must not reach.
    let others: Vec<_> = (0..8).map(|_| OwnedMemory::new(&space, SIZE).expect("memory")).collect();
    let again = others.iter().any(|other| other.range().overlaps(range));
    println!("the addresses were given out again: {again}");
    let remote = Remote { key: lease.key(), address: lease.address() };
    assert_eq!(bed.far_does(OperationCode::Write, 0, 8, remote), Status::RemoteAccessError);
    for other in &others {
        let mut bytes = [1; 8];
        other.read_at(0, &mut bytes).expect("our own memory");
        assert_eq!(bytes, [0; 8], "a write through an old key reached new memory");
    }
}

/// Memory that threads make, use through the cache, and drop, over and over at addresses that they take from each other.
#[test]
fn no_key_of_memory_that_is_gone_is_found_again_by_racing_threads() {
    let space = space();
    // Few entries, so that eviction runs beside the rest.
    let (bed, cache) = bed(&space, CacheConfig { max_entries: 6, ..CacheConfig::default() });
    let lives = AtomicU64::new(1);
    let life_of = Mutex::new(BTreeMap::<Key, u64>::new());
    let bed = Mutex::new(bed);
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (space, cache, lives, life_of, bed) = (&space, &cache, &lives, &life_of, &bed);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let memory = Arc::new(OwnedMemory::new(space, SIZE).expect("memory"));
                    let life = lives.fetch_add(1, Ordering::Relaxed);
                    let range = memory.user_range();
                    for turn in 0..4 {
                        let (offset, len) = (turn * 8192 + round % 64, 8192);
                        let lease = cache.get_part(&range, offset, len, rights()).expect("a region");
                        let again = cache.get_part(&range, offset + 1, 100, rights()).expect("a region");
                        // Made while the memory that was here before was still going, it is not kept.
                        if lease.is_current() {
                            assert_eq!(again.key(), lease.key(), "a change of other memory ended the entry");
                        }
                        let known = *life_of.lock().entry(lease.key()).or_insert(life);
                        assert_eq!(known, life, "a stale hit: {lease:?} was made for memory that is gone");
                        if turn == thread {
                            let bed = bed.lock();
                            bed.mirror.write_at(0, &life.to_le_bytes()).expect("our own memory");
                            let remote = Remote { key: lease.key(), address: lease.address() };
                            assert_eq!(bed.far_does(OperationCode::Write, 0, 8, remote), Status::Success);
                            drop(bed);
                            let mut bytes = [0; 8];
                            memory.read_at(offset, &mut bytes).expect("our own memory");
                            assert_eq!(u64::from_le_bytes(bytes), life, "the write went elsewhere");
                        }
                        if turn == 2 {
                            memory.discard(0, 4096).expect("whole pages");
                        }
                    }
                }
            });
        }
    });
    let stats = cache.stats();
    println!("{stats:?}");
    assert!(stats.ended > 0 && stats.hits > 0 && stats.misses > 0, "nothing raced: {stats:?}");
    drop(cache);
}
