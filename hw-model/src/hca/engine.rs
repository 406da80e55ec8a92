//! An engine: serves its queue pairs and moves their bytes. Sans-IO: it is stepped, and told the time.
//!
//! The rule of the burst: between [`Slot::begin`] and [`Slot::end`] nothing is allocated, freed, locked or logged. An
//! invalidation waits for the burst, the thread that unmaps memory waits for the invalidation, and that thread may hold
//! any lock of the process, the allocator's too. Buffers are taken before, packets sent and completions written after.

use super::ahead::{self, Arrived};
use super::cache::{Cache, TranslationCache};
use super::config::HcaConfig;
use super::device::Device;
use super::key::Caller;
use super::loan;
use super::mailbox::Mail;
use super::outbox::Outbox;
use super::qp::{Context, Core, Dma, ModifyQpError, Next, QpAttributes, QpChange};
use super::stats::Counters;
use super::time::Time;
use super::translate::{Obstacle, Piece, Span, span_capacity, transfer, translate};
use crate::bus::Slot;
use crate::link::Roused;
use crate::sync::Arc;
use crate::wire::{Payload, Qpn};
use hashbrown::HashMap;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something was done; there may be more.
    Worked,
    /// There is work, but the DMA epoch is closed. Nothing is lost; try again soon.
    Blocked,
    /// There is nothing to do until something is left in the mailbox, or until `wake_at`.
    Idle {
        /// The earliest deadline.
        wake_at: Option<Time>,
    },
}

/// Packets taken from the link for one turn of a queue pair.
const ARRIVALS_A_TURN: usize = 8;
/// Packets that a queue pair may send in its turn.
const PACKETS_A_TURN: usize = 8;
/// Turns in a step.
const TURNS_A_STEP: usize = 8;

/// Packets that do not wait for those of the next step.
const ENOUGH_TO_SEND: usize = 8;

/// One engine of an HCA.
pub(super) struct Engine {
    qps: HashMap<Qpn, Box<Core>>,
    mail: Mail,
    arrived: Arrived,
    desk: Desk,
}

/// What an engine has beside its queue pairs and their packets: what it serves one of them with. Apart from them, so that a
/// queue pair is looked up once a turn, and a packet stays where it is.
struct Desk {
    device: Arc<Device>,
    index: usize,
    /// As it was told last.
    now: Time,
    slot: Slot,
    ready: VecDeque<Qpn>,
    timers: BinaryHeap<Reverse<(Time, Qpn)>>,
    /// Where the bytes of the pending burst are, as the queue pair names them and on the bus. Never grow in a burst.
    pieces: Vec<Piece>,
    spans: Vec<Span>,
    /// Where the bytes of a loan are on the lender's bus.
    lent: Vec<Span>,
    /// What the queue pair asked for; its payload is empty when no burst is pending.
    dma: Dma,
    pending: Option<Pending>,
    /// What it remembers of translations, if it does.
    cache: Option<Box<TranslationCache>>,
    outbox: Outbox,
}

/// A burst that is not over.
#[derive(Clone, Copy)]
struct Pending {
    qpn: Qpn,
    incarnation: u64,
    caller: Caller,
    /// The bytes stay where they are: they are looked for, and the packet says where.
    lend: bool,
    /// The slot is busy and the spans are filled.
    translated: bool,
}

/// How far [`Desk::burst`] came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Burst {
    Over {
        bytes: usize,
    },
    /// In micro-steps: translated, not moved.
    Halfway,
    Closed,
}

impl Engine {
    pub(super) fn new(device: Arc<Device>, index: usize, slot: Slot) -> Self {
        let config: &HcaConfig = &device.config;
        let sges = config.limits.sges as usize;
        let seed = config.seed ^ index as u64;
        let cache = config.translation_cache.map(|shape| Box::new(TranslationCache::new(shape, seed)));
        let spans = span_capacity(config.payload_bytes(), sges);
        let desk = Desk {
            index,
            now: Time(0),
            slot,
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
            pieces: Vec::with_capacity(sges),
            spans: Vec::with_capacity(spans),
            lent: Vec::with_capacity(spans),
            dma: Dma::default(),
            pending: None,
            cache,
            outbox: Outbox::default(),
            device,
        };
        Self { qps: HashMap::new(), mail: Mail::default(), arrived: Arrived::default(), desk }
    }

    /// Engines of this process that are to hear of what this one sent. Whoever steps it sees to that after each step.
    pub(super) fn roused(&mut self) -> &mut Roused {
        self.desk.outbox.roused()
    }

    /// Does a bounded amount of work.
    pub(super) fn step(&mut self, now: Time) -> Step {
        let step = self.step_of_several(now);
        self.flush();
        step
    }

    /// One of several steps, after which [`Engine::flush`] comes: the few packets of one that mostly received go out with
    /// those of the next.
    pub(super) fn step_of_several(&mut self, now: Time) -> Step {
        self.desk.now = now;
        let step = self.work();
        self.desk.outbox.flush(&*self.desk.device.link, ENOUGH_TO_SEND);
        step
    }

    /// Has the link send what waits.
    pub(super) fn flush(&self) {
        self.desk.outbox.flush(&*self.desk.device.link, 0);
    }

    /// As [`Step::Idle`], if another step would find nothing to do.
    pub(super) fn rest(&self) -> Option<Step> {
        let desk = &self.desk;
        let busy = desk.pending.is_some() || !desk.ready.is_empty() || !self.arrived.is_empty();
        if busy || desk.device.mailboxes[desk.index].has_mail() {
            return None;
        }
        let wake_at = desk.wake_at();
        wake_at.is_none_or(|at| at > desk.now).then_some(Step::Idle { wake_at })
    }

    /// Whether there is nothing to do until `until`.
    pub(super) fn may_sleep(&mut self, now: Time, until: Time) -> bool {
        self.desk.now = now;
        matches!(self.rest(), Some(Step::Idle { wake_at }) if wake_at.is_none_or(|at| at >= until))
    }

    fn work(&mut self) -> Step {
        self.desk.counters().steps.add(1);
        let micro = self.desk.device.config.micro_steps;
        if let Some(Pending { qpn, .. }) = self.desk.pending {
            return match self.desk.burst(self.qps.get_mut(&qpn).map(|core| &mut **core)) {
                Burst::Closed => Step::Blocked,
                Burst::Over { .. } | Burst::Halfway => Step::Worked,
            };
        }
        self.desk.device.moderator.look(self.desk.now);
        let mut worked = self.collect();
        worked |= self.fire_timers();
        let mut budget = self.desk.device.config.max_burst as usize;
        for _ in 0..TURNS_A_STEP {
            let (arrivals, packets) = if micro { (1, 1) } else { (ARRIVALS_A_TURN, PACKETS_A_TURN) };
            let mut turned = false;
            for _ in 0..arrivals {
                let Some(burst) = self.take_in() else { break };
                turned = true;
                match burst {
                    Burst::Over { bytes } => budget = budget.saturating_sub(bytes),
                    Burst::Halfway => return Step::Worked,
                    Burst::Closed => return Step::Blocked,
                }
                if micro || budget == 0 {
                    return Step::Worked;
                }
            }
            if let Some(qpn) = self.desk.ready.pop_front() {
                turned = true;
                match self.serve(qpn, packets, &mut budget) {
                    Burst::Over { .. } => {}
                    Burst::Halfway => return Step::Worked,
                    Burst::Closed => return Step::Blocked,
                }
                if micro || budget == 0 {
                    return Step::Worked;
                }
            }
            worked |= turned;
            // What was sent to this very engine is answered while it is in the cache.
            if !self.collect() && !turned {
                break;
            }
            worked = true;
        }
        if worked { Step::Worked } else { Step::Idle { wake_at: self.desk.wake_at() } }
    }

    /// Gives the oldest packet that has arrived to its queue pair. `None`: there was none.
    fn take_in(&mut self) -> Option<Burst> {
        let packet = self.arrived.oldest(&self.desk.device.keys, &self.qps)?;
        let core = self.qps.get_mut(&packet.destination_qp);
        let burst = match core {
            Some(core) => {
                let next = core.receive(packet, &mut self.desk.context());
                self.desk.carry_out(core, next)
            }
            None => {
                self.desk.counters().packets_dropped.add(1);
                None
            }
        };
        self.arrived.taken();
        Some(burst.unwrap_or(Burst::Over { bytes: 0 }))
    }

    /// Takes what others have left. True if there was something.
    fn collect(&mut self) -> bool {
        let Self { qps, mail, arrived, desk } = self;
        let mailbox = &desk.device.mailboxes[desk.index];
        if !mailbox.has_mail() {
            return false;
        }
        mailbox.collect(mail);
        arrived.take_over(&mut mail.packets, &desk.device.keys);
        for qpn in mail.doorbells.drain(..) {
            if let Some(core) = qps.get_mut(&qpn) {
                core.shared.heard();
                desk.enlist(core);
            }
        }
        if std::mem::take(&mut mail.pkeys_changed) {
            let table = desk.device.condition.pkeys();
            qps.values_mut().for_each(|core| core.renew_pkey(&table));
        }
        if std::mem::take(&mut mail.failed) {
            qps.values_mut().for_each(|core| core.enter_error(&mut desk.context()));
        }
        for (token, outcome) in mail.answers.drain(..) {
            let waiting = qps.get_mut(&token.qpn);
            let waiting =
                waiting.and_then(|core| core.answer(token, outcome, &desk.context()).then_some(core));
            match waiting {
                Some(core) => desk.after(core),
                None => desk.counters().stale_answers.add(1),
            }
        }
        for given_back in mail.given_back.drain(..) {
            if let Some(core) = qps.get_mut(&given_back.qpn) {
                core.take_back(given_back, &mut desk.context());
                desk.after(core);
            }
        }
        true
    }

    fn fire_timers(&mut self) -> bool {
        let Self { qps, desk, .. } = self;
        let mut fired = false;
        while let Some(Reverse((time, qpn))) = desk.timers.peek().copied() {
            if time > desk.now {
                break;
            }
            desk.timers.pop();
            // An entry that was overtaken by an earlier one, or whose queue pair is gone, does nothing.
            if let Some(core) = qps.get_mut(&qpn).filter(|core| core.timer == Some(time)) {
                fired = true;
                core.timer = None;
                core.on_time(&mut desk.context());
                desk.after(core);
            }
        }
        fired
    }

    /// Gives a queue pair its turn.
    fn serve(&mut self, qpn: Qpn, packets: usize, budget: &mut usize) -> Burst {
        if let Some(next) = self.desk.ready.front() {
            ahead::queue_pair(&self.qps, *next);
        }
        let Some(core) = self.qps.get_mut(&qpn) else { return Burst::Over { bytes: 0 } };
        // It counts as listed until the turn is over, and goes to the end of the list if it may want more.
        let mut wants_more = true;
        for _ in 0..packets {
            let next = core.next(&mut self.desk.context());
            wants_more = !matches!(next, Next::Nothing);
            match self.desk.carry_out(core, next) {
                Some(Burst::Over { bytes }) => *budget = budget.saturating_sub(bytes),
                Some(other) => {
                    // The end of the burst lists it.
                    core.queued = false;
                    return other;
                }
                None => {}
            }
            if !wants_more || *budget == 0 {
                break;
            }
        }
        core.queued = false;
        if wants_more {
            self.desk.enlist(core);
        }
        Burst::Over { bytes: 0 }
    }

    /// A queue pair has new requests.
    pub(super) fn hear(&mut self, qpn: Qpn) {
        if let Some(core) = self.qps.get_mut(&qpn) {
            self.desk.enlist(core);
        }
    }

    pub(super) fn add(&mut self, qpn: Qpn, core: Box<Core>) {
        self.qps.insert(qpn, core);
    }

    /// Where a queue pair lies.
    pub(super) fn whereabouts(&self, qpn: Qpn) -> Option<[usize; 2]> {
        Some(self.qps.get(&qpn)?.whereabouts())
    }

    pub(super) fn modify(
        &mut self,
        qpn: Qpn,
        change: &QpChange,
        now: Time,
    ) -> Option<Result<(), ModifyQpError>> {
        let Self { qps, desk, .. } = self;
        desk.now = now;
        let core = qps.get_mut(&qpn)?;
        let result = core.apply(change, &mut desk.context());
        desk.after(core);
        Some(result)
    }

    /// What a queue pair is set to.
    pub(super) fn query(&self, qpn: Qpn) -> Option<QpAttributes> {
        Some(self.qps.get(&qpn)?.attributes())
    }

    /// Ends all that the queue pair has, and forgets it.
    pub(super) fn remove(&mut self, qpn: Qpn, now: Time) {
        self.desk.now = now;
        if let Some(mut core) = self.qps.remove(&qpn) {
            core.enter_error(&mut self.desk.context());
        }
    }
}

impl Desk {
    fn counters(&self) -> &Counters {
        &self.device.counters[self.index]
    }

    fn wake_at(&self) -> Option<Time> {
        let timer = self.timers.peek().map(|Reverse((time, _))| *time);
        match (timer, self.device.moderator.look(self.now)) {
            (Some(timer), Some(event)) => Some(timer.min(event)),
            (timer, event) => timer.or(event),
        }
    }

    /// What the protocol of a queue pair works with.
    fn context(&mut self) -> Context<'_> {
        Context {
            now: self.now,
            device: &self.device,
            counters: &self.device.counters[self.index],
            pieces: &mut self.pieces,
            dma: &mut self.dma,
            outbox: &self.outbox,
        }
    }

    /// Does the DMA that a queue pair asked for, if any, and sees to its list and its timer. `None`: there was none.
    fn carry_out(&mut self, core: &mut Core, next: Next) -> Option<Burst> {
        match next {
            Next::Dma => {}
            Next::Nothing => {
                self.set_timer(core);
                return None;
            }
            Next::Again | Next::Fail(_) | Next::Close => {
                self.after(core);
                return None;
            }
        }
        let fits = self.dma.payload.len() >= loan::LEAST && self.pieces.len() <= loan::PIECES;
        let lend = fits && core.lends(&self.dma.work);
        let (qpn, incarnation) = (core.shared.qpn, core.incarnation());
        let caller = Caller { pd: self.dma.pd, qpn };
        self.pending = Some(Pending { qpn, incarnation, caller, lend, translated: false });
        Some(self.burst(Some(core)))
    }

    /// Goes on with the pending burst, of `core` if that is still there.
    fn burst(&mut self, core: Option<&mut Core>) -> Burst {
        let Some(pending) = self.pending.take() else { return Burst::Over { bytes: 0 } };
        let Dma { direction, need, .. } = self.dma;
        let device = &*self.device;
        let counters = &device.counters[self.index];
        let mut result = Ok(());
        if !pending.translated {
            if self.slot.begin().is_err() {
                counters.epoch_closed.add(1);
                self.pending = Some(pending);
                return Burst::Closed;
            }
            let mut cache = Cache::new(self.cache.as_deref_mut(), counters);
            let who = (pending.caller, need);
            result = translate(&device.keys, &mut cache, who, direction, &self.pieces, &mut self.spans);
            if let (Ok(()), Some(loan)) = (&result, self.dma.payload.loan()) {
                result = loan.translate(self.slot.epoch(), &mut self.lent);
            }
            if device.config.micro_steps && result.is_ok() {
                self.pending = Some(Pending { translated: true, ..pending });
                return Burst::Halfway;
            }
        }
        if result.is_ok() && !pending.lend {
            let Device { keys, port, .. } = device;
            result = match self.dma.payload.loan() {
                Some(loan) => loan.copy(&self.lent, device, &self.pieces, &self.spans),
                None => transfer(keys, port, direction, &self.pieces, &self.spans, &mut self.dma.payload),
            };
        }
        self.slot.end();
        let bytes = if pending.lend { 0 } else { self.dma.payload.len() };
        if let (Err(Obstacle::CalledIn), Some(loan)) = (&result, self.dma.payload.loan()) {
            counters.loans_given_back.add(1);
            loan.give_back(self.dma.work.request_psn());
        }
        // A queue pair that was reset, failed or destroyed meanwhile has nothing to do with this burst any more.
        if let Some(core) = core {
            if core.incarnation() == pending.incarnation {
                if pending.lend && result.is_ok() {
                    // The packet says where its bytes are.
                    let loan = core.lender.lend(pending.caller, need, &self.pieces);
                    self.dma.payload = Payload::lent(loan, self.dma.payload.len());
                    counters.loans.add(1);
                }
                core.finish(result, &mut self.context());
            }
            self.after(core);
        }
        self.dma.payload = Payload::EMPTY;
        Burst::Over { bytes }
    }

    /// A queue pair may want more: into the list with it.
    fn after(&mut self, core: &mut Core) {
        self.enlist(core);
        self.set_timer(core);
    }

    fn enlist(&mut self, core: &mut Core) {
        if !core.queued {
            core.queued = true;
            self.ready.push_back(core.shared.qpn);
        }
    }

    /// One entry in the heap counts for a queue pair. A deadline that moved away is seen when the entry fires, so that
    /// the heap is not touched for every packet.
    fn set_timer(&mut self, core: &mut Core) {
        if let Some(deadline) = core.deadline()
            && core.timer.is_none_or(|timer| deadline < timer)
        {
            core.timer = Some(deadline);
            self.timers.push(Reverse((deadline, core.shared.qpn)));
        }
    }
}
