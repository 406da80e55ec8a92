//! Looking ahead: what the next packets and queue pairs need is asked for while the present one is served.
//!
//! A key among a hundred thousand is three misses of the cache, each of which tells where the next is. One after the other
//! for one packet after the other they would be most of the time that a small write takes; so each is asked for a packet
//! earlier than the next, and those of several packets are under way together.

use super::key::KeyTable;
use super::qp::Core;
use crate::prefetch;
use crate::wire::{Key, Packet, Payload, Qpn};
use hashbrown::HashMap;
use std::collections::VecDeque;

/// Packets that are kept after they were taken, at most: they go together, so that none has to be moved.
const KEPT: usize = 64;

/// What has arrived at an engine. Packets are looked at where they lie.
#[derive(Default)]
pub(super) struct Arrived {
    packets: VecDeque<Packet>,
    /// Those before it were taken.
    next: usize,
}

impl Arrived {
    /// Whether none is left.
    pub(super) fn is_empty(&self) -> bool {
        self.next == self.packets.len()
    }

    /// Takes over what is in `packets`, which is empty then.
    pub(super) fn take_over(&mut self, packets: &mut VecDeque<Packet>, keys: &KeyTable) {
        if self.packets.is_empty() {
            std::mem::swap(&mut self.packets, packets);
            self.begin(keys);
        } else {
            self.packets.append(packets);
        }
    }

    /// The oldest that is left. [`Arrived::taken`] says that it was taken.
    #[inline]
    pub(super) fn oldest(&mut self, keys: &KeyTable, qps: &HashMap<Qpn, Box<Core>>) -> Option<&mut Packet> {
        if self.is_empty() {
            return None;
        }
        self.step(keys, qps);
        self.packets.get_mut(self.next)
    }

    /// The oldest was taken.
    #[inline]
    pub(super) fn taken(&mut self) {
        if let Some(packet) = self.packets.get_mut(self.next) {
            packet.payload = Payload::EMPTY;
        }
        self.next += 1;
        if self.is_empty() {
            // From the beginning of its memory again, which is in the cache.
            self.packets.clear();
            self.next = 0;
        } else if self.next == KEPT {
            self.packets.drain(..KEPT);
            self.next = 0;
        }
    }

    /// Packet `index` of those that are left.
    fn packet(&self, index: usize) -> Option<&Packet> {
        self.packets.get(self.next + index)
    }

    /// The key of packet `index`, if it is another than that of the packet before it.
    #[inline]
    fn new_key(&self, index: usize) -> Option<Key> {
        let key = |index: usize| self.packet(index)?.header.reth().map(|reth| reth.key);
        let own = key(index)?;
        (index == 0 || key(index - 1) != Some(own)).then_some(own)
    }

    /// Packets have come to one who had none.
    fn begin(&self, keys: &KeyTable) {
        (0..3).filter_map(|index| self.new_key(index)).for_each(|key| keys.expect(key));
        if self.packets.len() > 1 {
            (0..2).filter_map(|index| self.new_key(index)).for_each(|key| keys.expect_slot(key));
            self.new_key(0).into_iter().for_each(|key| keys.expect_pages(key));
        }
    }

    /// The oldest is taken next.
    #[inline]
    fn step(&self, keys: &KeyTable, qps: &HashMap<Qpn, Box<Core>>) {
        let [Some(first), Some(second)] = [self.packet(0), self.packet(1)] else {
            self.new_key(0).into_iter().for_each(|key| keys.expect_slot(key));
            return;
        };
        if first.destination_qp != second.destination_qp {
            queue_pair(qps, second.destination_qp);
        }
        self.new_key(3).into_iter().for_each(|key| keys.expect(key));
        self.new_key(2).into_iter().for_each(|key| keys.expect_slot(key));
        self.new_key(1).into_iter().for_each(|key| keys.expect_pages(key));
    }
}

/// A queue pair is served next.
#[inline]
pub(super) fn queue_pair(qps: &HashMap<Qpn, Box<Core>>, qpn: Qpn) {
    if let Some(core) = qps.get(&qpn) {
        prefetch::expect(&**core);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::wire::{Gid, Header, Psn};

    #[test]
    fn packets_are_taken_in_order_however_they_come() {
        let (keys, qps, mut arrived) = (KeyTable::new(4, 0, 1), HashMap::new(), Arrived::default());
        let packet = |psn| Packet::reliable(Gid(1), (Gid(2), Qpn(3)), Psn::new(psn), Header::SendOnly);
        let (mut sent, mut taken) = (0, 0);
        for batch in [1, 3, 0, 200, 64, 63, 65, 2] {
            let mut packets: VecDeque<_> = (sent..sent + batch).map(packet).collect();
            sent += batch;
            arrived.take_over(&mut packets, &keys);
            assert!(packets.is_empty());
            // All but a few, so that some wait for the next batch.
            while taken + 5 < sent || batch == 2 && taken < sent {
                assert_eq!(arrived.oldest(&keys, &qps).expect("left").psn, Psn::new(taken));
                arrived.taken();
                taken += 1;
                assert!(arrived.packets.len() <= (sent - taken) as usize + KEPT);
            }
        }
        assert!(arrived.is_empty() && arrived.oldest(&keys, &qps).is_none());
    }
}
