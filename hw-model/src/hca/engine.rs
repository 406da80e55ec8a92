//! An engine: serves its queue pairs and moves their bytes. Sans-IO: it is stepped, and told the time.
//!
//! The rule of the burst: between [`Slot::begin`] and [`Slot::end`] nothing is allocated, freed, locked or logged. An
//! invalidation waits for the burst, the thread that unmaps memory waits for the invalidation, and that thread may hold
//! any lock of the process, the allocator's too. Buffers are taken before, packets sent and completions written after.

use super::cache::{Cache, TranslationCache};
use super::config::HcaConfig;
use super::device::Device;
use super::key::Caller;
use super::loan;
use super::mailbox::Mail;
use super::outbox::Outbox;
use super::qp::{Context, Core, Dma, ModifyQpError, Next, QpAttributes, QpChange};
use super::time::Time;
use super::translate::{Obstacle, Piece, Span, span_capacity, transfer, translate};
use crate::bus::Slot;
use crate::link::Roused;
use crate::sync::Arc;
use crate::wire::{Packet, Payload, Qpn};
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

/// One engine of an HCA.
pub(super) struct Engine {
    device: Arc<Device>,
    index: usize,
    slot: Slot,
    qps: HashMap<Qpn, Box<Core>>,
    mail: Mail,
    arrived: VecDeque<Packet>,
    ready: VecDeque<Qpn>,
    timers: BinaryHeap<Reverse<(Time, Qpn)>>,
    /// Where the bytes of the pending burst are, as the queue pair names them and on the bus. Never grow in a burst.
    pieces: Vec<Piece>,
    spans: Vec<Span>,
    /// Where the bytes of a loan are on the lender's bus.
    lent: Vec<Span>,
    pending: Option<Pending>,
    /// What it remembers of translations, if it does.
    cache: Option<Box<TranslationCache>>,
    outbox: Outbox,
}

/// A burst that is not over.
struct Pending {
    qpn: Qpn,
    incarnation: u64,
    caller: Caller,
    dma: Dma,
    /// The bytes stay where they are: they are looked for, and the packet says where.
    lend: bool,
    /// The slot is busy and the spans are filled.
    translated: bool,
}

/// How far [`Engine::burst`] came.
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
        Self {
            index,
            slot,
            qps: HashMap::new(),
            mail: Mail::default(),
            arrived: VecDeque::new(),
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
            pieces: Vec::with_capacity(sges),
            spans: Vec::with_capacity(spans),
            lent: Vec::with_capacity(spans),
            pending: None,
            cache,
            outbox: Outbox::default(),
            device,
        }
    }

    /// Engines of this process that are to hear of what this one sent. Whoever steps it sees to that after each step.
    pub(super) fn roused(&mut self) -> &mut Roused {
        self.outbox.roused()
    }

    /// Does a bounded amount of work.
    pub(super) fn step(&mut self, now: Time) -> Step {
        let step = self.work(now);
        self.device.link.flush();
        step
    }

    fn work(&mut self, now: Time) -> Step {
        self.device.counters[self.index].steps.add(1);
        let micro = self.device.config.micro_steps;
        if self.pending.is_some() {
            return match self.burst(now) {
                Burst::Closed => Step::Blocked,
                Burst::Over { .. } | Burst::Halfway => Step::Worked,
            };
        }
        self.device.moderator.look(now);
        let mut worked = self.collect(now);
        worked |= self.fire_timers(now);
        let mut budget = self.device.config.max_burst as usize;
        for _ in 0..TURNS_A_STEP {
            let (arrivals, packets) = if micro { (1, 1) } else { (ARRIVALS_A_TURN, PACKETS_A_TURN) };
            let mut turned = false;
            for _ in 0..arrivals {
                let Some(packet) = self.arrived.pop_front() else { break };
                turned = true;
                let qpn = packet.destination_qp;
                let next = self.with(qpn, now, |core, context| core.receive(packet, context));
                if next.is_none() {
                    self.device.counters[self.index].packets_dropped.add(1);
                }
                match self.carry_out(qpn, next, now) {
                    Some(Burst::Over { bytes }) => budget = budget.saturating_sub(bytes),
                    Some(Burst::Halfway) => return Step::Worked,
                    Some(Burst::Closed) => return Step::Blocked,
                    None => {}
                }
                if micro || budget == 0 {
                    return Step::Worked;
                }
            }
            if let Some(qpn) = self.ready.pop_front() {
                turned = true;
                match self.serve(qpn, packets, &mut budget, now) {
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
            if !self.collect(now) && !turned {
                break;
            }
            worked = true;
        }
        if worked { Step::Worked } else { Step::Idle { wake_at: self.wake_at(now) } }
    }

    /// The earliest deadline.
    pub(super) fn wake_at(&self, now: Time) -> Option<Time> {
        let timer = self.timers.peek().map(|Reverse((time, _))| *time);
        [timer, self.device.moderator.look(now)].into_iter().flatten().min()
    }

    /// Takes what others have left. True if there was something.
    fn collect(&mut self, now: Time) -> bool {
        if !self.device.mailboxes[self.index].has_mail() {
            return false;
        }
        let mut mail = std::mem::take(&mut self.mail);
        self.device.mailboxes[self.index].collect(&mut mail);
        if self.arrived.is_empty() {
            std::mem::swap(&mut self.arrived, &mut mail.packets);
        } else {
            self.arrived.append(&mut mail.packets);
        }
        for qpn in mail.doorbells.drain(..) {
            if let Some(core) = self.qps.get_mut(&qpn) {
                core.shared.heard();
                Self::enlist(&mut self.ready, qpn, core);
            }
        }
        for (token, outcome) in mail.answers.drain(..) {
            let mut waited = false;
            self.with(token.qpn, now, |core, context| {
                waited = core.answer(token, outcome, context);
                Next::Again
            });
            if waited {
                self.after(token.qpn);
            } else {
                self.device.counters[self.index].stale_answers.add(1);
            }
        }
        for given_back in mail.given_back.drain(..) {
            self.with(given_back.qpn, now, |core, context| {
                core.take_back(given_back, context);
                Next::Again
            });
            self.after(given_back.qpn);
        }
        self.mail = mail;
        true
    }

    fn fire_timers(&mut self, now: Time) -> bool {
        let mut fired = false;
        while let Some(Reverse((time, qpn))) = self.timers.peek().copied() {
            if time > now {
                break;
            }
            self.timers.pop();
            // An entry that was overtaken by an earlier one, or whose queue pair is gone, does nothing.
            let counts = self.qps.get(&qpn).is_some_and(|core| core.timer == Some(time));
            if counts {
                fired = true;
                self.with(qpn, now, |core, context| {
                    core.timer = None;
                    core.on_time(context);
                    Next::Again
                });
                self.after(qpn);
            }
        }
        fired
    }

    /// Gives a queue pair its turn.
    fn serve(&mut self, qpn: Qpn, packets: usize, budget: &mut usize, now: Time) -> Burst {
        if let Some(core) = self.qps.get_mut(&qpn) {
            core.queued = false;
        }
        for _ in 0..packets {
            let next = self.with(qpn, now, |core, context| core.next(context));
            let nothing = matches!(next, None | Some(Next::Nothing));
            match self.carry_out(qpn, next, now) {
                Some(Burst::Over { bytes }) => *budget = budget.saturating_sub(bytes),
                Some(other) => return other,
                None => {}
            }
            if nothing {
                return Burst::Over { bytes: 0 };
            }
            if *budget == 0 {
                break;
            }
        }
        Burst::Over { bytes: 0 }
    }

    /// Runs the protocol of one queue pair.
    fn with(
        &mut self,
        qpn: Qpn,
        now: Time,
        run: impl FnOnce(&mut Core, &mut Context<'_>) -> Next,
    ) -> Option<Next> {
        let counters = &self.device.counters[self.index];
        let core = self.qps.get_mut(&qpn)?;
        let mut context =
            Context { now, device: &self.device, counters, pieces: &mut self.pieces, outbox: &self.outbox };
        Some(run(core, &mut context))
    }

    /// Does the DMA that a queue pair asked for, if any, and sees to its list and its timer. `None`: there was none.
    fn carry_out(&mut self, qpn: Qpn, next: Option<Next>, now: Time) -> Option<Burst> {
        let next = next?;
        let nothing = matches!(next, Next::Nothing);
        let Next::Dma(dma) = next else {
            if nothing {
                self.set_timer(qpn)
            } else {
                self.after(qpn)
            }
            return None;
        };
        let core = self.qps.get_mut(&qpn)?;
        let (caller, incarnation) = (core.shared.caller(), core.incarnation());
        let fits = dma.payload.len() >= loan::LEAST && self.pieces.len() <= loan::PIECES;
        let lend = fits && core.lends(&dma.work);
        self.pending = Some(Pending { qpn, incarnation, caller, dma, lend, translated: false });
        Some(self.burst(now))
    }

    /// Goes on with the pending burst.
    fn burst(&mut self, now: Time) -> Burst {
        let Some(mut pending) = self.pending.take() else { return Burst::Over { bytes: 0 } };
        let Dma { direction, need, .. } = pending.dma;
        let mut result = Ok(());
        if !pending.translated {
            if self.slot.begin().is_err() {
                self.device.counters[self.index].epoch_closed.add(1);
                self.pending = Some(pending);
                return Burst::Closed;
            }
            let keys = &self.device.keys;
            let mut cache = Cache::new(self.cache.as_deref_mut(), &self.device.counters[self.index]);
            result =
                translate(keys, &mut cache, (pending.caller, need), direction, &self.pieces, &mut self.spans);
            if let (Ok(()), Some(loan)) = (&result, pending.dma.payload.loan()) {
                result = loan.translate(self.slot.epoch(), &mut self.lent);
            }
            if self.device.config.micro_steps && result.is_ok() {
                pending.translated = true;
                self.pending = Some(pending);
                return Burst::Halfway;
            }
        }
        if result.is_ok() && !pending.lend {
            let Device { keys, port, .. } = &*self.device;
            result = match pending.dma.payload.loan() {
                Some(loan) => loan.copy(&self.lent, &self.device, &self.pieces, &self.spans),
                None => transfer(keys, port, direction, &self.pieces, &self.spans, &mut pending.dma.payload),
            };
        }
        self.slot.end();
        let qpn = pending.qpn;
        let bytes = if pending.lend { 0 } else { pending.dma.payload.len() };
        if pending.lend && result.is_ok() {
            self.lend(&mut pending);
        }
        if let (Err(Obstacle::CalledIn), Some(loan)) = (&result, pending.dma.payload.loan()) {
            self.device.counters[self.index].loans_given_back.add(1);
            loan.give_back(pending.dma.work.request_psn());
        }
        // A queue pair that was reset, failed or destroyed meanwhile has nothing to do with this burst any more.
        if self.qps.get(&qpn).is_some_and(|core| core.incarnation() == pending.incarnation) {
            self.with(qpn, now, |core, context| core.finish(pending.dma, result, context));
        }
        self.after(qpn);
        Burst::Over { bytes }
    }

    /// Has the packet say where its bytes are.
    fn lend(&self, pending: &mut Pending) {
        let core = self.qps.get(&pending.qpn);
        if let Some(core) = core.filter(|core| core.incarnation() == pending.incarnation) {
            let loan = core.lender.lend(pending.caller, pending.dma.need, &self.pieces);
            pending.dma.payload = Payload::lent(loan, pending.dma.payload.len());
            self.device.counters[self.index].loans.add(1);
        }
    }

    /// A queue pair may want more: into the list with it.
    fn after(&mut self, qpn: Qpn) {
        if let Some(core) = self.qps.get_mut(&qpn) {
            Self::enlist(&mut self.ready, qpn, core);
            self.set_timer(qpn);
        }
    }

    fn enlist(ready: &mut VecDeque<Qpn>, qpn: Qpn, core: &mut Core) {
        if !core.queued {
            core.queued = true;
            ready.push_back(qpn);
        }
    }

    /// One entry in the heap counts for a queue pair. A deadline that moved away is seen when the entry fires, so that
    /// the heap is not touched for every packet.
    fn set_timer(&mut self, qpn: Qpn) {
        let Some(core) = self.qps.get_mut(&qpn) else { return };
        if let Some(deadline) = core.deadline()
            && core.timer.is_none_or(|timer| deadline < timer)
        {
            core.timer = Some(deadline);
            self.timers.push(Reverse((deadline, qpn)));
        }
    }

    pub(super) fn add(&mut self, qpn: Qpn, core: Core) {
        self.qps.insert(qpn, Box::new(core));
    }

    pub(super) fn modify(
        &mut self,
        qpn: Qpn,
        change: &QpChange,
        now: Time,
    ) -> Option<Result<(), ModifyQpError>> {
        let mut result = None;
        self.with(qpn, now, |core, context| {
            result = Some(core.apply(change, context));
            Next::Again
        });
        self.after(qpn);
        result
    }

    /// What a queue pair is set to.
    pub(super) fn query(&self, qpn: Qpn) -> Option<QpAttributes> {
        Some(self.qps.get(&qpn)?.attributes())
    }

    /// Ends all that the queue pair has, and forgets it.
    pub(super) fn remove(&mut self, qpn: Qpn, now: Time) {
        self.with(qpn, now, |core, context| {
            core.enter_error(context);
            Next::Nothing
        });
        self.qps.remove(&qpn);
    }
}
