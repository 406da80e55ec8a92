//! The HCA as software sees it: where objects are made, and where threads come in.

use super::cache::TranslationCacheConfig;
use super::config::{HcaConfig, NewHcaError, PathMtu};
use super::cq::Moderator;
use super::device_memory::Internal;
use super::engine::{Engine, Step};
use super::events::AsyncEvents;
use super::fault::{FaultOutcome, FaultQueue, FaultToken};
use super::incidents::Condition;
use super::key::KeyTable;
use super::mailbox::Mailbox;
use super::multicast::Groups;
use super::pd::{Pd, PdError, PdTable};
use super::points;
use super::qp::{
    CreateQpError, ModifyQpError, QpAddress, QpAttributes, QpChange, QpSpec, QueuePair, Shared, SrqTable,
};
use super::stats::{Counters, HcaStats, LiveObjects};
use super::time::Time;
use crate::bus::{DmaEpoch, DmaPort, MAX_SLOTS};
use crate::fault_plan::Points;
use crate::link::{Ingress, Link, LoanTerms, Roused};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Arc, Mutex, Weak};
use crate::wire::{Gid, Packet, PayloadPool, Psn, Qpn};
use crossbeam::sync::Parker;
use hashbrown::HashSet;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use std::time::Instant;

/// What the engines of a device share.
pub(super) struct Device {
    pub(super) config: HcaConfig,
    pub(super) points: Points,
    pub(super) condition: Condition,
    pub(super) port: DmaPort,
    pub(super) link: Box<dyn Link>,
    pub(super) gid: Gid,
    pub(super) keys: KeyTable,
    pub(super) faults: FaultQueue,
    pub(super) srqs: SrqTable,
    pub(super) groups: Arc<Groups>,
    pub(super) events: Arc<AsyncEvents>,
    pub(super) moderator: Arc<Moderator>,
    pub(super) pool: Arc<PayloadPool>,
    pub(super) mailboxes: Arc<[Mailbox]>,
    pub(super) counters: Box<[Counters]>,
}

/// An RDMA host channel adapter.
///
/// Engines do the work: threads of their own ([`Hca::spawn_engines`]), the threads that post and poll, or a simulation
/// that calls [`Hca::step_engine`]. Objects hold the device by `Arc` and are destroyed by dropping them.
pub struct Hca {
    pub(super) device: Arc<Device>,
    engines: Box<[Mutex<Engine>]>,
    pub(super) parkers: Mutex<Vec<Parker>>,
    pub(super) threads: AtomicU32,
    pub(super) pds: PdTable,
    pub(super) cqs: AtomicU32,
    pub(super) last_cqn: AtomicU32,
    pub(super) channels: AtomicU32,
    pub(super) ahs: AtomicU32,
    pub(super) internal: Mutex<Option<Internal>>,
    qps: Mutex<QpNumbers>,
    origin: Instant,
}

struct QpNumbers {
    live: HashSet<Qpn>,
    last: u32,
    random: ChaCha20Rng,
}

/// The receiving side: every packet to the mailbox of the engine that has its queue pair.
struct Inbox {
    mailboxes: Arc<[Mailbox]>,
    groups: Arc<Groups>,
    /// To run its engines on the thread that delivers.
    hca: Weak<Hca>,
    epoch: Arc<DmaEpoch>,
    whole_bursts: bool,
}

impl Inbox {
    /// Gives everybody who is attached to its group a copy of a packet.
    fn spread(&self, packet: &Packet) -> usize {
        for qpn in self.groups.members(packet.destination) {
            let index = self.leave(Packet { destination_qp: qpn, ..packet.clone() });
            self.wake(index);
        }
        0
    }
}

impl Ingress for Inbox {
    fn deliver(&self, packet: Packet) {
        let index = self.leave(packet);
        self.wake(index);
    }
    fn leave(&self, packet: Packet) -> usize {
        if packet.destination_qp == Qpn::MULTICAST {
            return self.spread(&packet);
        }
        let index = packet.destination_qp.0 as usize % self.mailboxes.len();
        self.mailboxes[index].leave_packet(packet);
        index
    }
    fn wake(&self, index: usize) {
        self.mailboxes[index].wake();
    }
    fn run(&self, index: usize, steps: &mut usize, roused: &mut Roused) {
        match self.hca.upgrade().filter(|hca| hca.device.config.callers_drive) {
            Some(hca) => hca.run(index, steps, roused),
            None => self.wake(index),
        }
    }
    fn deliver_all(&self, packets: &mut Vec<Packet>) {
        for packet in packets.drain(..) {
            self.leave(packet);
        }
        let driven = self.hca.upgrade().filter(|hca| hca.device.config.callers_drive);
        for (index, mailbox) in self.mailboxes.iter().enumerate().filter(|(_, mailbox)| mailbox.has_mail()) {
            match &driven {
                Some(hca) => hca.drive(index),
                None => mailbox.wake(),
            }
        }
    }
    fn takes_lots(&self) -> bool {
        true
    }
    fn whereabouts(&self, qpn: Qpn) -> Option<[usize; 2]> {
        self.hca.upgrade()?.engine(qpn).try_lock()?.whereabouts(qpn)
    }
    fn takes_loans(&self, terms: &LoanTerms<'_>) -> bool {
        Arc::ptr_eq(&self.epoch, terms.epoch) && self.whole_bursts == terms.whole_bursts
    }
}

/// Idle payload buffers kept for each engine.
const BUFFERS_AN_ENGINE: usize = 256;

impl Hca {
    /// A device that masters the bus through `port` and talks through `link`.
    ///
    /// # Errors
    /// See [`NewHcaError`].
    pub fn new(config: HcaConfig, port: DmaPort, link: Box<dyn Link>) -> Result<Arc<Self>, NewHcaError> {
        Self::with_points(config, port, link, Points::OFF)
    }

    /// As [`Hca::new`], with what happens at its fault points ([`points`]).
    ///
    /// # Errors
    /// See [`NewHcaError`].
    pub fn with_points(
        config: HcaConfig,
        port: DmaPort,
        link: Box<dyn Link>,
        points: Points,
    ) -> Result<Arc<Self>, NewHcaError> {
        if config.engines == 0 {
            return Err(NewHcaError::NoEngines);
        }
        if let Some(TranslationCacheConfig { pages, keys }) = config.translation_cache {
            let wrong = [pages, keys].into_iter().find(|shape| !shape.is_possible());
            wrong.map_or(Ok(()), |shape| Err(NewHcaError::CacheShape { shape }))?;
        }
        let max_payload = link.max_payload();
        if max_payload < PathMtu::MIN.bytes() as usize {
            return Err(NewHcaError::LinkTooSmall { max_payload });
        }
        let mut config = config;
        config.path_mtu = config.path_mtu.within(max_payload);
        let taken = port.epoch().slot_count();
        let refused = NewHcaError::NoEpochSlot { engines: config.engines, taken, max: MAX_SLOTS as u32 };
        let slots: Option<Vec<_>> = (0..config.engines).map(|_| port.epoch().register()).collect();
        let slots = slots.ok_or(refused)?;
        let parkers: Vec<Parker> = slots.iter().map(|_| Parker::new()).collect();
        let mailboxes: Arc<[Mailbox]> =
            parkers.iter().map(|parker| Mailbox::new(parker.unparker().clone())).collect();
        let mut random = ChaCha20Rng::seed_from_u64(config.seed);
        let device = Arc::new(Device {
            gid: link.address(),
            keys: KeyTable::new(config.limits.keys, config.key_quarantine, random.next_u64()),
            faults: FaultQueue::new(config.fault_queue_depth, config.fault_scheme),
            srqs: SrqTable::default(),
            groups: Arc::default(),
            events: Arc::new(AsyncEvents::new()),
            moderator: Arc::new(Moderator::new()),
            pool: PayloadPool::new(config.payload_bytes(), BUFFERS_AN_ENGINE * config.engines as usize),
            mailboxes: Arc::clone(&mailboxes),
            counters: slots.iter().map(|_| Counters::default()).collect(),
            condition: Condition::new(config.pkeys),
            config,
            points,
            port,
            link,
        });
        let engine = |(index, slot)| Mutex::new(Engine::new(Arc::clone(&device), index, slot));
        let engines = slots.into_iter().enumerate().map(engine).collect();
        let pds = PdTable::new(config.limits.pds);
        let qps = QpNumbers { live: HashSet::new(), last: random.next_u32(), random };
        let hca = Arc::new(Self {
            device,
            engines,
            parkers: Mutex::new(parkers),
            threads: AtomicU32::new(0),
            pds,
            cqs: AtomicU32::new(0),
            last_cqn: AtomicU32::new(0),
            channels: AtomicU32::new(0),
            ahs: AtomicU32::new(0),
            internal: Mutex::new(None),
            qps: Mutex::new(qps),
            origin: Instant::now(),
        });
        let inbox = Inbox {
            mailboxes,
            groups: Arc::clone(&hca.device.groups),
            hca: Arc::downgrade(&hca),
            epoch: Arc::clone(hca.device.port.epoch()),
            whole_bursts: !config.micro_steps,
        };
        hca.device.link.attach(Arc::new(inbox));
        Ok(hca)
    }

    /// What it was built with, the path MTU capped to what the link carries.
    #[must_use]
    pub fn config(&self) -> &HcaConfig {
        &self.device.config
    }

    /// The address of its port.
    #[must_use]
    pub fn gid(&self) -> Gid {
        self.device.gid
    }

    /// Its connection to the bus.
    #[must_use]
    pub fn port(&self) -> &DmaPort {
        &self.device.port
    }

    /// A new protection domain.
    ///
    /// # Errors
    /// [`PdError::TooMany`].
    pub fn alloc_pd(&self) -> Result<Pd, PdError> {
        if self.device.points.meet(points::ALLOC_PD).fails() {
            return Err(PdError::TooMany { max: self.device.config.limits.pds });
        }
        self.pds.alloc()
    }

    /// Gives a protection domain back.
    ///
    /// # Errors
    /// [`PdError::InUse`] while keys or queue pairs are in it; [`PdError::Unknown`].
    pub fn dealloc_pd(&self, pd: Pd) -> Result<(), PdError> {
        self.pds.dealloc(pd)
    }

    /// A new queue pair, in the reset state.
    ///
    /// # Errors
    /// See [`CreateQpError`].
    pub fn create_qp(self: &Arc<Self>, spec: &QpSpec) -> Result<Arc<QueuePair>, CreateQpError> {
        let limits = &self.device.config.limits;
        spec.check(self)?;
        self.pds.hold(spec.pd)?;
        let Some((qpn, psn)) = self.number_qp() else {
            self.pds.release(spec.pd);
            return Err(CreateQpError::TooMany { max: limits.qps });
        };
        let address = QpAddress { gid: self.device.gid, qpn, psn };
        let (qp, core) = QueuePair::new(Arc::clone(self), address, spec, &self.device.config);
        self.engine(qpn).lock().add(qpn, core);
        if let Some(domain) = &spec.domain {
            domain.admit(&qp);
        }
        Ok(qp)
    }

    fn number_qp(&self) -> Option<(Qpn, Psn)> {
        let mut numbers = self.qps.lock();
        let refused = self.device.points.meet(points::CREATE_QP).fails();
        if numbers.live.len() >= self.device.config.limits.qps as usize || refused {
            return None;
        }
        loop {
            numbers.last = numbers.last.wrapping_add(1) & 0xff_ffff;
            let qpn = Qpn(numbers.last);
            if qpn.0 > 1 && qpn != Qpn::MULTICAST && numbers.live.insert(qpn) {
                return Some((qpn, Psn::new(numbers.random.next_u32())));
            }
        }
    }

    pub(super) fn forget_qp(&self, qpn: Qpn, pd: Pd) {
        self.device.groups.forget(qpn, &*self.device.link);
        self.engine(qpn).lock().remove(qpn, self.now());
        // Its windows go before its number can be another's.
        self.device.keys.unbind_of(qpn);
        self.device.events.forget(|event| event.qpn() == Some(qpn));
        self.qps.lock().live.remove(&qpn);
        self.pds.release(pd);
    }

    pub(super) fn modify_qp(&self, qpn: Qpn, change: &QpChange) -> Result<(), ModifyQpError> {
        if self.has_failed() {
            return Err(ModifyQpError::Failed);
        }
        if self.device.points.meet(points::MODIFY_QP).fails() {
            return Err(ModifyQpError::Refused);
        }
        let result = self.engine(qpn).lock().modify(qpn, change, self.now());
        self.device.mailboxes[self.index(qpn)].wake();
        result.unwrap_or(Err(ModifyQpError::Destroyed))
    }

    pub(super) fn query_qp(&self, qpn: Qpn) -> Result<QpAttributes, ModifyQpError> {
        self.engine(qpn).lock().query(qpn).ok_or(ModifyQpError::Destroyed)
    }

    /// The asynchronous events.
    #[must_use]
    pub fn events(&self) -> &AsyncEvents {
        &self.device.events
    }

    /// The page-fault events.
    #[must_use]
    pub fn faults(&self) -> &FaultQueue {
        &self.device.faults
    }

    /// Answers a page-fault event. An answer that nobody waits for any more is counted and does nothing. Never blocks
    /// on an engine; it may allocate, so not under a lock that an invalidation takes. Where callers drive, the queue pair may
    /// go on on this thread.
    pub fn resume(&self, token: FaultToken, outcome: FaultOutcome) {
        if token.is_shared() {
            for (token, outcome) in self.device.faults.answered(token, outcome) {
                self.leave_answer(token, outcome);
            }
        } else {
            self.leave_answer(token, outcome);
        }
    }

    fn leave_answer(&self, token: FaultToken, outcome: FaultOutcome) {
        let index = self.index(token.qpn);
        let mailbox = &self.device.mailboxes[index];
        mailbox.leave(|mail| mail.answers.push((token, outcome)));
        if self.device.config.callers_drive && self.has_threads() {
            self.see_to(index);
        } else {
            mailbox.wake();
        }
    }

    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> HcaStats {
        let mut stats = HcaStats::default();
        for counters in &self.device.counters {
            counters.add_to(&mut stats);
        }
        stats
    }

    /// Objects that exist at the moment.
    #[must_use]
    pub fn live_objects(&self) -> LiveObjects {
        LiveObjects {
            pds: self.pds.live(),
            keys: self.device.keys.live(),
            cqs: u64::from(self.cqs.load(Ordering::Relaxed)),
            qps: self.qps.lock().live.len() as u64,
            channels: u64::from(self.channels.load(Ordering::Relaxed)),
            device_memory: self.device_memory_in_use(),
            ahs: u64::from(self.ahs.load(Ordering::Relaxed)),
            srqs: self.device.srqs.live(),
        }
    }

    /// One step of engine `index`, for a driver that has its own time.
    ///
    /// # Panics
    /// If there is no such engine.
    pub fn step_engine(&self, index: usize, now: Time) -> Step {
        let mut engine = self.engines[index].lock();
        let step = engine.step(now);
        engine.roused().wake();
        step
    }

    /// Time as the threads of this device tell it to the engines.
    pub(super) fn now(&self) -> Time {
        self.time_of(Instant::now())
    }

    pub(super) fn time_of(&self, instant: Instant) -> Time {
        Time(instant.saturating_duration_since(self.origin).as_nanos() as u64)
    }

    /// Runs every engine a little on the calling thread, if the configuration allows that.
    pub fn progress(&self) {
        if self.device.config.callers_drive {
            for index in 0..self.engines.len() {
                self.drive(index);
            }
        }
    }

    /// A queue pair has new requests. Whoever steps its engine hears of it by mail.
    pub(super) fn doorbell(&self, shared: &Shared) {
        let qpn = shared.qpn;
        let index = self.index(qpn);
        let drives = self.device.config.callers_drive;
        if drives && self.drive_for(qpn, index) {
            return;
        }
        if shared.ring() {
            self.device.mailboxes[index].leave(|mail| mail.doorbells.push(qpn));
        }
        if drives {
            self.drive(index);
        } else {
            self.device.mailboxes[index].wake();
        }
    }

    fn index(&self, qpn: Qpn) -> usize {
        qpn.0 as usize % self.engines.len()
    }

    pub(super) fn engine_at(&self, index: usize) -> &Mutex<Engine> {
        &self.engines[index]
    }

    fn engine(&self, qpn: Qpn) -> &Mutex<Engine> {
        &self.engines[self.index(qpn)]
    }

    pub(super) fn has_threads(&self) -> bool {
        self.threads.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Hca {
    fn drop(&mut self) {
        self.device.link.detach();
        // A packet that nobody takes any more can hold its sender, and be held by it.
        for mailbox in self.device.mailboxes.iter() {
            mailbox.close();
        }
    }
}

impl std::fmt::Debug for Hca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hca")
            .field("gid", &self.device.gid)
            .field("engines", &self.engines.len())
            .field("live", &self.live_objects())
            .finish_non_exhaustive()
    }
}
