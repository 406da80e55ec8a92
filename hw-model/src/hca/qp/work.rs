//! What a queue pair's protocol works with, and what it asks of its engine.

use super::queue::Shared;
use crate::addr::RegionAddr;
use crate::hca::config::PathMtu;
use crate::hca::device::Device;
use crate::hca::fault::{FaultAccess, FaultKind, FaultScheme, FaultToken, FaultWait, PageFault, Posted};
use crate::hca::key::Access;
use crate::hca::outbox::Outbox;
use crate::hca::pd::Pd;
use crate::hca::points;
use crate::hca::request::Status;
use crate::hca::stats::Counters;
use crate::hca::time::Time;
use crate::hca::translate::{Direction, Piece};
use crate::wire::{Gid, GlobalRoute, Header, Key, PKey, Packet, Payload, Psn, Qpn, RnrTimer, Service};

/// What a queue pair's protocol works with for the length of one call.
pub(in crate::hca) struct Context<'a> {
    pub(in crate::hca) now: Time,
    pub(in crate::hca) device: &'a Device,
    pub(in crate::hca) counters: &'a Counters,
    /// Filled with what a [`Dma`] moves.
    pub(in crate::hca) pieces: &'a mut Vec<Piece>,
    /// The DMA that is asked for, or that has been done. It stays where it is: it is large.
    pub(in crate::hca) dma: &'a mut Dma,
    pub(in crate::hca) outbox: &'a Outbox,
}

/// What a queue pair wants next.
pub(in crate::hca) enum Next {
    /// Nothing, until a packet, a post, an answer or its deadline.
    Nothing,
    /// It has done something that needed no DMA, and may want more.
    Again,
    /// Bytes are to be moved, as [`Context::dma`] says; their places are in [`Context::pieces`].
    Dma,
    /// The oldest request fails, and with it the queue pair.
    Fail(Status),
    /// The queue pair goes to the error state.
    Close,
}

/// A DMA of one packet's payload, and what comes after.
pub(in crate::hca) struct Dma {
    pub(in crate::hca) direction: Direction,
    pub(in crate::hca) need: Access,
    /// Whose memory: the protection domain of the queue pair, or of the queue that an extended request is for.
    pub(in crate::hca) pd: Pd,
    pub(in crate::hca) payload: Payload,
    pub(in crate::hca) work: Work,
}

impl Default for Dma {
    /// Nothing to do.
    fn default() -> Self {
        let work = Work::Land { psn: Psn::new(0) };
        // The first that is given is 1.
        let pd = Pd(0);
        Self { direction: Direction::Gather, need: Access::empty(), pd, payload: Payload::EMPTY, work }
    }
}

/// The bits of a packet that say what its receiver is to do besides (9.2.3, 9.7.3).
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::hca) struct Marks {
    pub(in crate::hca) ack_request: bool,
    pub(in crate::hca) solicited: bool,
}

/// What a DMA is a part of.
#[derive(Clone, Copy, Debug)]
pub(in crate::hca) enum Work {
    /// Requester: gather the payload of a request packet, then send it.
    Request { header: Header, psn: Psn, marks: Marks },
    /// Requester: scatter a read response, or the word that an atomic gave back.
    Land { psn: Psn },
    /// Responder: scatter a send or a write, or do an atomic.
    Place { header: Header, psn: Psn, marks: Marks, from: Option<Qpn> },
    /// Responder: gather a read response, then send it.
    Respond { header: Header, psn: Psn },
}

impl Work {
    /// Of the receiver of a request packet: the packet's number.
    pub(in crate::hca) fn request_psn(&self) -> Option<Psn> {
        match self {
            Self::Place { psn, .. } => Some(*psn),
            Self::Request { .. } | Self::Land { .. } | Self::Respond { .. } => None,
        }
    }
}

/// Where packets go, what they carry for it, and how large they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Route {
    pub(super) gid: Gid,
    pub(super) qpn: Qpn,
    pub(super) global: GlobalRoute,
    pub(super) mtu: PathMtu,
    pub(super) pkey: PKey,
    pub(super) service: Service,
}

/// A page that is missing, and how much of the message lies behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageAt {
    pub(super) key: Key,
    pub(super) address: RegionAddr,
    pub(super) rest: u64,
}

impl Context<'_> {
    /// Sends one packet.
    pub(super) fn send(&self, route: &Route, psn: Psn, marks: Marks, header: Header, payload: Payload) {
        if !self.device.lets_out() {
            self.counters.packets_dropped.add(1);
            return;
        }
        self.counters.packets_sent.add(1);
        self.counters.bytes_sent.add(payload.len() as u64);
        let packet = Packet {
            source: self.device.gid,
            destination: route.gid,
            route: route.global,
            service: route.service,
            destination_qp: route.qpn,
            pkey: route.pkey,
            psn,
            ack_request: marks.ack_request,
            solicited: marks.solicited,
            migrated: true,
            header,
            payload,
        };
        self.outbox.send(&*self.device.link, packet);
    }

    /// Asks for a DMA.
    pub(super) fn request(&mut self, dma: Dma) -> Next {
        *self.dma = dma;
        Next::Dma
    }

    /// Room for what is to go to the peer at `route`.
    pub(super) fn payload_to(&self, route: &Route, bytes: u32) -> Payload {
        let there = self.device.link.room(route.gid, bytes as usize);
        there.unwrap_or_else(|| self.payload(bytes))
    }

    /// A payload buffer.
    pub(super) fn payload(&self, bytes: u32) -> Payload {
        self.device.pool.take(bytes as usize)
    }

    /// A payload that holds `data`, which is no longer than a packet.
    pub(super) fn payload_of(&self, data: &[u8]) -> Payload {
        let mut payload = self.device.pool.take(data.len());
        payload.copy_from_slice(data);
        payload
    }

    /// Asks software for a page. `retry` is how long it is waited before it is asked again, if it cannot be asked now.
    pub(super) fn ask(
        &self,
        shared: &Shared,
        kind: FaultKind,
        at: PageAt,
        direction: Direction,
        retry: RnrTimer,
    ) -> FaultWait {
        let token = FaultToken { qpn: shared.qpn, side: kind, serial: 0 };
        let access = match direction {
            Direction::Gather => FaultAccess::Read,
            Direction::Scatter | Direction::Atomic(_) => FaultAccess::Write,
        };
        let PageAt { key, address, rest } = at;
        let fault = PageFault { token, qpn: shared.qpn, key, kind, address, length: rest, access };
        let refused = self.device.points.meet(points::FAULT_EVENT).fails();
        let posted = if refused { None } else { self.device.faults.post(fault).ok() };
        match posted {
            Some(Posted::Joined(token)) => {
                self.counters.faults_joined.add(1);
                FaultWait::Asked(token)
            }
            Some(Posted::Event(token)) => {
                match (self.device.config.fault_scheme, kind) {
                    (FaultScheme::ByRange, _) => self.counters.faults_by_range.add(1),
                    (_, FaultKind::ByWorkRequest) => self.counters.faults_by_work_request.add(1),
                    (_, _) => self.counters.faults_by_remote_access.add(1),
                }
                FaultWait::Asked(token)
            }
            None => {
                self.counters.fault_queue_full.add(1);
                FaultWait::Unasked { until: self.now.after(retry.nanoseconds()) }
            }
        }
    }
}
