//! A link that loses, duplicates and reorders what is sent through it, from a seed.

use super::{Ingress, Link};
use crate::sync::{Arc, Mutex};
use crate::wire::{Gid, Packet, Qpn};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::VecDeque;

/// How often each thing happens, in packets of a thousand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LossRates {
    /// Lost.
    pub drop: u32,
    /// Sent twice.
    pub duplicate: u32,
    /// Held back until up to four later packets have passed.
    pub reorder: u32,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LossCounts {
    /// Packets given to the link.
    pub sent: u64,
    /// Of those, lost.
    pub dropped: u64,
    /// Of those, sent twice.
    pub duplicated: u64,
    /// Of those, held back.
    pub reordered: u64,
}

/// A wrapper of another link. What it does to one direction, wrap the other port for the other.
pub struct FaultyLink<L> {
    inner: L,
    state: Mutex<State>,
}

struct State {
    random: ChaCha8Rng,
    rates: LossRates,
    counts: LossCounts,
    /// Packets held back, each with the number of sends it still waits for.
    held: VecDeque<(u32, Packet)>,
}

impl<L: Link> FaultyLink<L> {
    /// Wraps `inner`. The same seed does the same to the same packets.
    pub fn new(inner: L, rates: LossRates, seed: u64) -> Self {
        let random = ChaCha8Rng::seed_from_u64(seed);
        let state = State { random, rates, counts: LossCounts::default(), held: VecDeque::new() };
        Self { inner, state: Mutex::new(state) }
    }

    /// Changes the rates.
    pub fn set_rates(&self, rates: LossRates) {
        self.state.lock().rates = rates;
    }

    /// What happened so far.
    pub fn counts(&self) -> LossCounts {
        self.state.lock().counts
    }
}

impl State {
    /// The packets that go out when `packet` is sent, at most: itself twice, and those whose time has come.
    fn pass(&mut self, packet: Packet, out: &mut Vec<Packet>) {
        let happens = |random: &mut ChaCha8Rng, rate: u32| random.random_range(0..1000) < rate;
        self.counts.sent += 1;
        if happens(&mut self.random, self.rates.drop) {
            self.counts.dropped += 1;
        } else if happens(&mut self.random, self.rates.reorder) {
            self.counts.reordered += 1;
            let wait = self.random.random_range(1..=4);
            self.held.push_back((wait, packet));
        } else {
            if happens(&mut self.random, self.rates.duplicate) {
                self.counts.duplicated += 1;
                out.push(packet.clone());
            }
            out.push(packet);
        }
        for (wait, _) in &mut self.held {
            *wait = wait.saturating_sub(1);
        }
        while let Some(due) = self.held.iter().position(|(wait, _)| *wait == 0) {
            out.extend(self.held.remove(due).map(|(_, packet)| packet));
        }
    }
}

impl<L: Link> Link for FaultyLink<L> {
    fn address(&self) -> Gid {
        self.inner.address()
    }
    fn max_payload(&self) -> usize {
        self.inner.max_payload()
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        self.inner.attach(ingress);
    }
    fn detach(&self) {
        self.inner.detach();
        self.state.lock().held.clear();
    }
    fn send(&self, packet: Packet) {
        let mut out = Vec::new();
        self.state.lock().pass(packet, &mut out);
        for packet in out {
            self.inner.send(packet);
        }
    }
    fn flush(&self) {
        self.inner.flush();
    }
    fn congested(&self, peer: Gid, qp: Qpn) {
        self.inner.congested(peer, qp);
    }
}

impl<L> std::fmt::Debug for FaultyLink<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.lock();
        f.debug_struct("FaultyLink").field("rates", &state.rates).field("counts", &state.counts).finish()
    }
}
