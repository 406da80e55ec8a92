//! A network in virtual time: what is sent arrives later, or not, or twice, or in another order, or mangled.
//!
//! What flies are the bytes of real RoCEv2 packets, IPv6 header to invariant CRC: each packet is written when it is sent and
//! read again when it arrives, so that a header that cannot be written or read back fails a run.

use super::choices::Choices;
use hw_model::hca::{Gid, Time};
use hw_model::link::{Ingress, Link};
use hw_model::sync::{Arc, Mutex};
use hw_model::wire::{
    Content, Flow, Identification, Malformed, Packet, PayloadPool, check_icrc, encode, encode_datagram,
    parse, parse_datagram,
};
use std::collections::BTreeMap;

/// Largest payload of a packet: as on a path MTU of 4096.
const MAX_PAYLOAD: usize = 4096;

/// What happens to packets, in so many of a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// Lost.
    pub lost: u32,
    /// Delivered twice.
    pub twice: u32,
    /// The longest way, in nanoseconds: where it differs from packet to packet, they overtake each other.
    pub longest_ns: u32,
}

/// What happened to packets.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetworkCounts {
    /// Sent.
    pub sent: u64,
    /// Of those, lost.
    pub lost: u64,
    /// Of those, lost because the receiver saw that a bit had changed on the way.
    pub mangled: u64,
    /// Of those, sent on a second time.
    pub doubled: u64,
    /// Delivered after a packet that was sent later.
    pub overtaken: u64,
}

#[derive(Default)]
struct Shared {
    ports: BTreeMap<Gid, Arc<dyn Ingress>>,
    outbox: Vec<Packet>,
}

struct Flight {
    due: Time,
    number: u64,
    to: Gid,
    bytes: Vec<u8>,
}

/// The UDP port that everything is sent from.
const SOURCE_PORT: u16 = 0xc000;
/// Where the base transport header begins: after the headers of IPv6 and UDP.
const TRANSPORT: usize = 48;
/// The byte that holds the congestion bits, which no CRC covers.
const CONGESTION: usize = TRANSPORT + 4;
/// Payload buffers kept for reuse.
const BUFFERS: usize = 64;

/// The network of one world.
pub struct Network {
    shared: Arc<Mutex<Shared>>,
    pool: Arc<PayloadPool>,
    flights: Vec<Flight>,
    created: u128,
    number: u64,
    latest: u64,
    /// What it does to packets.
    pub weather: Weather,
    /// What it did.
    pub counts: NetworkCounts,
}

/// One port.
pub struct Port {
    shared: Arc<Mutex<Shared>>,
    address: Gid,
}

impl Network {
    /// A network without ports.
    #[must_use]
    pub fn new(weather: Weather) -> Self {
        Self {
            shared: Arc::default(),
            pool: PayloadPool::new(MAX_PAYLOAD, BUFFERS),
            flights: Vec::new(),
            created: 0,
            number: 0,
            latest: 0,
            weather,
            counts: NetworkCounts::default(),
        }
    }

    /// A new port.
    pub fn port(&mut self) -> Port {
        self.created += 1;
        Port { shared: Arc::clone(&self.shared), address: Gid((0xfe80 << 112) + self.created) }
    }

    /// Takes what engines have sent since and decides its fate.
    pub fn collect(&mut self, now: Time, choices: &mut Choices) {
        let sent = std::mem::take(&mut self.shared.lock().outbox);
        for packet in sent {
            self.counts.sent += 1;
            let to = packet.destination;
            let bytes = written(&packet);
            if self.weather.lost > 0 && choices.chance(self.weather.lost) {
                self.counts.lost += 1;
                // Every other one gets there, but not as it was.
                if self.counts.lost.is_multiple_of(2) {
                    self.mangle(bytes);
                }
                continue;
            }
            if self.weather.twice > 0 && choices.chance(self.weather.twice) {
                self.counts.doubled += 1;
                self.send_on(to, bytes.clone(), now, choices);
            }
            self.send_on(to, bytes, now, choices);
        }
    }

    /// Flips a bit: which one follows from how many there were, so that a shorter run draws no other decisions.
    fn mangle(&mut self, mut bytes: Vec<u8>) {
        self.counts.mangled += 1;
        let covered = bytes.len() - TRANSPORT - 1;
        let at = TRANSPORT + (self.counts.sent as usize * 31) % covered;
        let at = if at >= CONGESTION { at + 1 } else { at };
        bytes[at] ^= 1 << (self.counts.mangled % 8);
        let taken = read(&bytes, &self.pool);
        assert!(taken.is_err(), "byte {at} of {bytes:02x?} was changed and nobody saw it: {taken:?}");
    }

    fn send_on(&mut self, to: Gid, bytes: Vec<u8>, now: Time, choices: &mut Choices) {
        let way = if self.weather.longest_ns > 0 { choices.below(self.weather.longest_ns) } else { 0 };
        self.number += 1;
        self.flights.push(Flight { due: now.after(u64::from(way)), number: self.number, to, bytes });
    }

    /// When the next packet arrives.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        self.flights.iter().map(|flight| flight.due).min()
    }

    /// Delivers the packet that has waited longest of those that are due. Gives whom to, and a line about it if
    /// that is wanted.
    pub fn deliver(&mut self, now: Time, described: bool) -> Option<(Gid, Option<String>)> {
        let due = self.flights.iter().enumerate().filter(|(_, flight)| flight.due <= now);
        let (index, _) = due.min_by_key(|(_, flight)| (flight.due, flight.number))?;
        let Flight { number, to, bytes, .. } = self.flights.remove(index);
        if number < self.latest {
            self.counts.overtaken += 1;
        }
        self.latest = self.latest.max(number);
        let packet = read(&bytes, &self.pool).expect("what was written can be read");
        let line = described.then(|| {
            let Packet { destination_qp, psn, header, payload, .. } = &packet;
            format!("{destination_qp:?} {psn:?} {header:?}, {} bytes", payload.len())
        });
        let ingress = self.shared.lock().ports.get(&to).cloned();
        if let Some(ingress) = ingress {
            ingress.deliver(packet);
        }
        Some((to, line))
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flights.is_empty() && self.shared.lock().outbox.is_empty()
    }
}

/// The bytes of a packet, from its IP header to its invariant CRC.
fn written(packet: &Packet) -> Vec<u8> {
    let Packet { source, destination, route, .. } = *packet;
    let flow = Flow::between(source, destination, SOURCE_PORT).expect("all addresses here are of IPv6");
    let mut content = Vec::with_capacity(64 + packet.payload.len());
    encode(packet, &flow, 0, &mut content);
    let mut bytes = Vec::with_capacity(TRANSPORT + content.len());
    encode_datagram(&flow, 0, route, &content, &mut bytes);
    bytes
}

/// The packet that the bytes are.
fn read(bytes: &[u8], pool: &Arc<PayloadPool>) -> Result<Packet, Malformed> {
    let datagram = parse_datagram(bytes)?;
    check_icrc(&datagram.flow, Identification::Known(0), datagram.content)?;
    let content: Content<'_> = parse(&datagram.flow, datagram.route, datagram.content)?;
    content.into_packet(pool)?.ok_or(Malformed::Opcode)
}

impl Link for Port {
    fn address(&self) -> Gid {
        self.address
    }
    fn max_payload(&self) -> usize {
        MAX_PAYLOAD
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        self.shared.lock().ports.insert(self.address, ingress);
    }
    fn detach(&self) {
        let gone = self.shared.lock().ports.remove(&self.address);
        drop(gone);
    }
    fn send(&self, packet: Packet) {
        self.shared.lock().outbox.push(packet);
    }
}
