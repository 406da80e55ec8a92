//! Who may reach what: 15.

use crate::bed::{Bed, space};
use crate::checks::Verdict;
use crate::remapped::Remapped;
use anypage::machine::MachineConfig;
use hw_model::addr::PAGE_SIZE;
use hw_model::hca::{Key, OperationCode, Remote, Status};
use hw_model::sync::Arc;
use mr::{Device, RegisterOptions};
use odp::space::UserRange;
use std::collections::HashSet;

fn bed() -> (Bed, UserRange) {
    let (space, memory) = (space(), Remapped::new(4));
    let range = memory.user_range(Arc::clone(&space) as _);
    (Bed::new(&space, &range, RegisterOptions::on_demand(), &MachineConfig::default()), range)
}

/// Invariant 15: a peer that has nothing but `key` changes no byte, learns none, and loses its connection.
fn reaches_nothing(bed: &mut Bed, key: Key) -> Verdict {
    let remote = Remote { key, address: bed.near.region.address() };
    for what in [OperationCode::Write, OperationCode::Read] {
        bed.reconnect();
        bed.mirror.write_at(0, &[0xee; 64]).expect("our own memory");
        let status = bed.far_does(what, 0, 64, remote);
        if status != Status::RemoteAccessError {
            return Err(format!("{what:?} with {key:?}: {status:?}"));
        }
        assert_eq!(bed.far_bytes(0, 64), [0xee; 64], "nothing came back");
        let next = bed.far_does(what, 0, 64, remote);
        assert_eq!(next, Status::FlushError, "the queue pair is in the error state");
    }
    bed.reconnect();
    Ok(())
}

#[test]
fn invariant_15_a_key_that_is_not_one_reaches_no_memory() {
    let (mut bed, range) = bed();
    let live = bed.near.region.key();
    assert_eq!(bed.write(0, 64), Status::Success);
    let before = bed.near.region.raw_entries();
    for guess in [0, 1, u32::MAX, live.0 ^ 1, live.0.wrapping_add(1), live.0.swap_bytes()] {
        reaches_nothing(&mut bed, Key(guess)).expect("never given");
    }
    // Of another protection domain.
    let other = Arc::clone(&bed.machine.near).alloc_pd().expect("a domain");
    let foreign = other.register(&range, RegisterOptions::on_demand()).expect("a region");
    reaches_nothing(&mut bed, foreign.key()).expect("another domain's");
    foreign.deregister();
    reaches_nothing(&mut bed, foreign.key()).expect("deregistered");
    assert_eq!(bed.near.region.raw_entries(), before, "nor did any of it change the live region");
    bed.near.region.deregister();
    reaches_nothing(&mut bed, live).expect("deregistered");
    crate::checks::protocol_kept(&bed.machine, &bed.space).expect("refused by the key, not by the IOMMU");
}

#[test]
fn invariant_15_keys_are_random_and_stay_out_of_use_for_a_while() {
    let (bed, range) = bed();
    let page = range.part(0, PAGE_SIZE).expect("in it");
    let mut keys = vec![bed.near.region.key().0];
    for _ in 0..1000 {
        let pd = Arc::clone(&bed.near.pd);
        keys.push(pd.register(&page, RegisterOptions::on_demand()).expect("a region").key().0);
    }
    let different: HashSet<_> = keys.iter().collect();
    assert_eq!(different.len(), keys.len(), "a key that was given back was given out again at once");
    let steps: HashSet<_> = keys.windows(2).map(|pair| pair[1].wrapping_sub(pair[0])).collect();
    assert!(steps.len() > 990, "one key does not tell the next");
    let high = keys.iter().filter(|key| **key >> 31 == 1).count();
    assert!((350..650).contains(&high), "{high} of 1001 keys have the highest bit set");
}

#[test]
fn invariant_15_can_fail() {
    let (mut bed, _) = bed();
    let live = bed.near.region.key();
    let wrong = reaches_nothing(&mut bed, live).expect_err("a live key does reach memory");
    assert!(wrong.contains("Success"), "{wrong}");
}
