//! Looking ahead: what the next packets and queue pairs need is asked for while the present one is served.
//!
//! A key among a hundred thousand is three misses of the cache, each of which tells where the next is. One after the other
//! for one packet after the other they would be most of the time that a small write takes; so each is asked for a packet
//! earlier than the next, and those of several packets are under way together.

use super::key::KeyTable;
use super::qp::Core;
use crate::prefetch;
use crate::wire::{Key, Packet, Qpn};
use hashbrown::HashMap;
use std::collections::VecDeque;

/// The key of packet `index`, if it is another than that of the packet before it.
#[inline]
fn new_key(packets: &VecDeque<Packet>, index: usize) -> Option<Key> {
    let key = |index: usize| packets.get(index)?.header.reth().map(|reth| reth.key);
    let own = key(index)?;
    (index == 0 || key(index - 1) != Some(own)).then_some(own)
}

/// Packets have come to one who had none.
#[inline]
pub(super) fn begin(keys: &KeyTable, packets: &VecDeque<Packet>) {
    (0..3).filter_map(|index| new_key(packets, index)).for_each(|key| keys.expect(key));
    if packets.len() > 1 {
        (0..2).filter_map(|index| new_key(packets, index)).for_each(|key| keys.expect_slot(key));
        new_key(packets, 0).into_iter().for_each(|key| keys.expect_pages(key));
    }
}

/// The first of `packets` is taken next.
#[inline]
pub(super) fn step(keys: &KeyTable, qps: &HashMap<Qpn, Box<Core>>, packets: &VecDeque<Packet>) {
    let [Some(first), Some(second)] = [packets.front(), packets.get(1)] else {
        new_key(packets, 0).into_iter().for_each(|key| keys.expect_slot(key));
        return;
    };
    if first.destination_qp != second.destination_qp {
        queue_pair(qps, second.destination_qp);
    }
    new_key(packets, 3).into_iter().for_each(|key| keys.expect(key));
    new_key(packets, 2).into_iter().for_each(|key| keys.expect_slot(key));
    new_key(packets, 1).into_iter().for_each(|key| keys.expect_pages(key));
}

/// A queue pair is served next.
#[inline]
pub(super) fn queue_pair(qps: &HashMap<Qpn, Box<Core>>, qpn: Qpn) {
    if let Some(core) = qps.get(&qpn) {
        prefetch::expect(&**core);
    }
}
