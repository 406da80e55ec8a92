//! A link that loses, duplicates, reorders, delays and mangles what passes, from a seed: by kind of packet and direction.

use super::{Ingress, Link, LoanTerms};
use crate::sync::{Arc, Mutex};
use crate::wire::{
    Flow, Gid, Header, Identification, Packet, PayloadPool, Qpn, ROCE_PORT, check_icrc, encode, parse,
};
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
    /// Held back until 8 to 64 later packets have passed: by then it has been asked for again.
    pub delay: u32,
    /// A bit of its bytes is flipped. The receiver's checks see to it that it goes no further.
    pub corrupt: u32,
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
    /// Of those, held back for long.
    pub delayed: u64,
    /// Of those, mangled, and stopped by the checks of a receiver.
    pub corrupted: u64,
}

bitflags::bitflags! {
    /// Kinds of packets.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PacketKinds: u32 {
        /// Sends, with immediate data or invalidation or without.
        const SEND = 1;
        /// RDMA writes, and atomic writes.
        const WRITE = 1 << 1;
        /// RDMA read requests.
        const READ_REQUEST = 1 << 2;
        /// Their answers.
        const READ_RESPONSE = 1 << 3;
        /// Compare and swap, fetch and add.
        const ATOMIC = 1 << 4;
        /// Acknowledgements of every kind.
        const ACKNOWLEDGE = 1 << 5;
        /// Flushes.
        const FLUSH = 1 << 6;
    }
}

impl PacketKinds {
    /// The kind of a packet.
    #[must_use]
    pub fn of(header: &Header) -> Self {
        match header {
            Header::ReadRequest(_) => Self::READ_REQUEST,
            Header::ReadResponseFirst(_)
            | Header::ReadResponseMiddle
            | Header::ReadResponseLast(_)
            | Header::ReadResponseOnly(_) => Self::READ_RESPONSE,
            Header::Acknowledge(_) | Header::AtomicAcknowledge(..) => Self::ACKNOWLEDGE,
            Header::CompareSwap(_) | Header::FetchAdd(_) => Self::ATOMIC,
            Header::Flush(..) => Self::FLUSH,
            Header::AtomicWrite(_) => Self::WRITE,
            header if header.write_position().is_some() => Self::WRITE,
            _ => Self::SEND,
        }
    }
}

/// Which way packets go, seen from the port that is wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PacketDirection {
    /// Away from it.
    Outgoing,
    /// To it.
    Incoming,
}

/// What happens to some of the packets. The first rule that speaks of a packet decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LossRule {
    /// Which way they go.
    pub direction: PacketDirection,
    /// Of which kind they are.
    pub kinds: PacketKinds,
    /// How often what happens to them.
    pub rates: LossRates,
}

/// A wrapper of another link.
pub struct FaultyLink<L> {
    inner: L,
    state: Arc<Mutex<State>>,
}

struct State {
    random: ChaCha8Rng,
    rules: Vec<(LossRule, LossCounts)>,
    /// Packets held back in each direction, each with the number of packets it still waits for.
    held: [VecDeque<(u32, Packet)>; 2],
}

impl<L: Link> FaultyLink<L> {
    /// Wraps `inner`: this happens to every packet that it sends. The same seed does the same to the same packets.
    pub fn new(inner: L, rates: LossRates, seed: u64) -> Self {
        let kinds = PacketKinds::all();
        Self::with_rules(inner, [LossRule { direction: PacketDirection::Outgoing, kinds, rates }], seed)
    }

    /// Wraps `inner`, with rules.
    pub fn with_rules(inner: L, rules: impl IntoIterator<Item = LossRule>, seed: u64) -> Self {
        let random = ChaCha8Rng::seed_from_u64(seed);
        let rules = rules.into_iter().map(|rule| (rule, LossCounts::default())).collect();
        Self { inner, state: Arc::new(Mutex::new(State { random, rules, held: Default::default() })) }
    }

    /// Changes the rates of every rule.
    pub fn set_rates(&self, rates: LossRates) {
        self.state.lock().rules.iter_mut().for_each(|(rule, _)| rule.rates = rates);
    }

    /// What happened so far, by all rules together.
    pub fn counts(&self) -> LossCounts {
        let mut sum = LossCounts::default();
        for (_, counts) in &self.state.lock().rules {
            sum.sent += counts.sent;
            sum.dropped += counts.dropped;
            sum.duplicated += counts.duplicated;
            sum.reordered += counts.reordered;
            sum.delayed += counts.delayed;
            sum.corrupted += counts.corrupted;
        }
        sum
    }

    /// What happened so far by each rule, in their order: a rule that never fired tested nothing.
    pub fn counts_by_rule(&self) -> Vec<LossCounts> {
        self.state.lock().rules.iter().map(|(_, counts)| *counts).collect()
    }

    /// The link that is wrapped.
    pub fn inner(&self) -> &L {
        &self.inner
    }
}

impl State {
    /// The packets that go on when `packet` comes, at most: itself twice, and those whose time has come.
    fn pass(&mut self, direction: PacketDirection, packet: Packet, out: &mut Vec<Packet>) {
        let Self { random, rules, held } = self;
        let held = &mut held[direction as usize];
        let kind = PacketKinds::of(&packet.header);
        let ruled =
            rules.iter_mut().find(|(rule, _)| rule.direction == direction && rule.kinds.contains(kind));
        match ruled {
            Some((rule, counts)) => rule.apply(counts, packet, random, held, out),
            None => out.push(packet),
        }
        for (wait, _) in held.iter_mut() {
            *wait = wait.saturating_sub(1);
        }
        while let Some(due) = held.iter().position(|(wait, _)| *wait == 0) {
            out.extend(held.remove(due).map(|(_, packet)| packet));
        }
    }
}

impl LossRule {
    fn apply(
        &self,
        counts: &mut LossCounts,
        packet: Packet,
        random: &mut ChaCha8Rng,
        held: &mut VecDeque<(u32, Packet)>,
        out: &mut Vec<Packet>,
    ) {
        let LossRates { drop, duplicate, reorder, delay, corrupt } = self.rates;
        let happens = |random: &mut ChaCha8Rng, rate: u32| rate > 0 && random.random_range(0..1000) < rate;
        counts.sent += 1;
        if happens(random, drop) {
            counts.dropped += 1;
        } else if happens(random, corrupt) {
            let bit = random.random_range(0..u32::MAX) as usize;
            match corrupted(&packet, bit) {
                // As a real receiver would: what it cannot tell from a good packet it takes.
                Some(taken) => out.push(taken),
                None => counts.corrupted += 1,
            }
        } else if happens(random, delay) {
            counts.delayed += 1;
            held.push_back((random.random_range(8..=64), packet));
        } else if happens(random, reorder) {
            counts.reordered += 1;
            held.push_back((random.random_range(1..=4), packet));
        } else {
            if happens(random, duplicate) {
                counts.duplicated += 1;
                out.push(packet.clone());
            }
            out.push(packet);
        }
    }
}

/// What a receiver makes of the bytes of `packet` with a bit flipped: nothing, if its checks are worth anything.
fn corrupted(packet: &Packet, bit: usize) -> Option<Packet> {
    if packet.payload.loan().is_some() {
        return None;
    }
    let flow = Flow::between(packet.source, packet.destination, ROCE_PORT)?;
    let mut bytes = Vec::new();
    encode(packet, &flow, 0, &mut bytes);
    let bit = bit % (bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
    check_icrc(&flow, Identification::Known(0), &bytes).ok()?;
    let content = parse(&flow, packet.route, &bytes).ok()?;
    content.into_packet(&PayloadPool::new(packet.payload.len(), 0)).ok()?
}

/// The receiving side behind a faulty link.
struct FaultyIngress {
    inner: Arc<dyn Ingress>,
    state: Arc<Mutex<State>>,
}

impl Ingress for FaultyIngress {
    fn deliver(&self, packet: Packet) {
        let mut out = Vec::new();
        self.state.lock().pass(PacketDirection::Incoming, packet, &mut out);
        out.into_iter().for_each(|packet| self.inner.deliver(packet));
    }
    fn deliver_all(&self, packets: &mut Vec<Packet>) {
        let mut out = Vec::with_capacity(packets.len());
        let mut state = self.state.lock();
        for packet in packets.drain(..) {
            state.pass(PacketDirection::Incoming, packet, &mut out);
        }
        drop(state);
        self.inner.deliver_all(&mut out);
    }
    fn takes_loans(&self, terms: &LoanTerms<'_>) -> bool {
        self.inner.takes_loans(terms)
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
        self.inner.attach(Arc::new(FaultyIngress { inner: ingress, state: Arc::clone(&self.state) }));
    }
    fn detach(&self) {
        self.inner.detach();
        self.state.lock().held.iter_mut().for_each(VecDeque::clear);
    }
    fn send(&self, packet: Packet) {
        let mut out = Vec::new();
        self.state.lock().pass(PacketDirection::Outgoing, packet, &mut out);
        for packet in out {
            self.inner.send(packet);
        }
    }
    fn join(&self, group: Gid) -> std::io::Result<()> {
        self.inner.join(group)
    }
    fn part(&self, group: Gid) {
        self.inner.part(group);
    }
    fn flush(&self) {
        self.inner.flush();
    }
    fn poll(&self) {
        self.inner.poll();
    }
    fn rest(&self) {
        self.inner.rest();
    }
    fn named_counts(&self) -> Vec<(&'static str, u64)> {
        self.inner.named_counts()
    }
    fn congested(&self, peer: Gid, qp: Qpn) {
        self.inner.congested(peer, qp);
    }
    fn takes_loans(&self, destination: Gid, terms: &LoanTerms<'_>) -> bool {
        self.inner.takes_loans(destination, terms)
    }
}

impl<L> std::fmt::Debug for FaultyLink<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultyLink").field("rules", &self.state.lock().rules).finish_non_exhaustive()
    }
}
