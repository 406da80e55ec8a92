//! Loans: between two HCAs over one memory, a packet says where its bytes are, and the receiving engine copies them from
//! there to their place. One copy, and no buffer.
//!
//! What is lent is the right to read, not an address: keys, pages and translations are looked up again, as the lender's
//! own, inside the burst that copies. So an invalidation on the lender's side (clear, drain, unlink, release) is as safe as
//! if the lender gathered: a burst that begins after the clearing finds the page gone, and the drain waits for one that
//! began before, because both engines have their slots in the one epoch of that memory.
//!
//! A request's bytes may be read until it ends. It ends well only when all its packets have been placed, and a packet is
//! placed once. Where it ends otherwise (an error, a reset, the queue pair destroyed) packets of it can be anywhere: the
//! lender calls in all its loans first ([`Lender::call_in`]), and waits for a burst that copies at that moment, which it
//! can because a burst waits for nobody.
//!
//! Bytes that are not where they were are the lender's business: it is told ([`Loan::give_back`]) and sends the packet
//! again, with the bytes in it. That costs no retry, and whatever is wrong with the memory the lender meets itself.

use super::cache::Cache;
use super::device::Device;
use super::key::{Access, Caller};
use super::translate::{Direction, Obstacle, Piece, Span, borrow, translate};
use crate::bus::DmaEpoch;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::wire::{Psn, Qpn};

/// Payloads below this are carried: finding them again costs more than the copy that is saved.
pub(super) const LEAST: usize = 1024;
/// Pieces that a loan has room for. What is in more is carried.
pub(super) const PIECES: usize = 2;

/// A queue pair, to those who have its loans.
pub(crate) struct Lender {
    device: Arc<Device>,
    qpn: Qpn,
    /// Loans of earlier incarnations are void.
    incarnation: AtomicU64,
}

/// The right to read a packet's bytes where they are.
#[derive(Clone)]
pub(crate) struct Loan {
    lender: Arc<Lender>,
    incarnation: u64,
    caller: Caller,
    need: Access,
    pieces: [Piece; PIECES],
    count: u8,
}

/// A packet whose bytes were not there any more.
#[derive(Clone, Copy)]
pub(super) struct GivenBack {
    pub(super) qpn: Qpn,
    pub(super) incarnation: u64,
    /// Of a request; a response is asked for again by the one who misses it.
    pub(super) request: Option<Psn>,
}

impl Lender {
    pub(super) fn new(device: Arc<Device>, qpn: Qpn) -> Arc<Self> {
        Arc::new(Self { device, qpn, incarnation: AtomicU64::new(0) })
    }

    /// Lends what `from` names: up to [`PIECES`].
    pub(super) fn lend(self: &Arc<Self>, caller: Caller, need: Access, from: &[Piece]) -> Loan {
        let mut pieces = [Piece::NONE; PIECES];
        pieces[..from.len()].copy_from_slice(from);
        Loan {
            lender: Arc::clone(self),
            incarnation: self.incarnation.load(Ordering::Relaxed),
            caller,
            need,
            pieces,
            count: from.len() as u8,
        }
    }

    /// Makes all loans void. When this returns, nobody reads what was lent, if anything `was_lent`.
    /// Gives the next incarnation.
    pub(super) fn call_in(&self, was_lent: bool) -> u64 {
        let next = self.incarnation.fetch_add(1, Ordering::SeqCst) + 1;
        // In micro-steps a borrower looks again before it moves anything, and nothing goes on while this waits.
        if !was_lent || self.device.config.micro_steps {
            return next;
        }
        let epoch = self.device.port.epoch();
        let mut drain = epoch.drain();
        while !drain.poll(epoch) {
            crate::sync::thread::yield_now();
        }
        next
    }
}

impl Loan {
    /// Whether it is of the memory of `epoch` and has not been called in.
    pub(super) fn is_good(&self, epoch: &Arc<DmaEpoch>) -> bool {
        Arc::ptr_eq(self.lender.device.port.epoch(), epoch)
            && self.lender.incarnation.load(Ordering::Acquire) == self.incarnation
    }

    /// Fills `spans` with where the bytes are now.
    pub(super) fn translate(&self, epoch: &Arc<DmaEpoch>, spans: &mut Vec<Span>) -> Result<(), Obstacle> {
        if !self.is_good(epoch) {
            return Err(Obstacle::CalledIn);
        }
        let pieces = &self.pieces[..usize::from(self.count)];
        let keys = &self.lender.device.keys;
        // The cache is the borrower's own, and these are the lender's keys.
        translate(keys, &mut Cache::none(), (self.caller, self.need), Direction::Gather, pieces, spans)
            .map_err(|_| Obstacle::CalledIn)
    }

    /// Copies from `from` to the `spans` of `pieces` of `device`.
    pub(super) fn copy(
        &self,
        from: &[Span],
        device: &Device,
        pieces: &[Piece],
        spans: &[Span],
    ) -> Result<(), Obstacle> {
        if !self.is_good(device.port.epoch()) {
            return Err(Obstacle::CalledIn);
        }
        borrow(&device.keys, &device.port, pieces, spans, (&self.lender.device.port, from))
    }

    /// Tells the lender that the bytes of a packet were not there. Outside a burst.
    pub(super) fn give_back(&self, request: Option<Psn>) {
        let Lender { device, qpn, .. } = &*self.lender;
        let mailbox = &device.mailboxes[qpn.0 as usize % device.mailboxes.len()];
        let given_back = GivenBack { qpn: *qpn, incarnation: self.incarnation, request };
        mailbox.leave(|mail| mail.given_back.push(given_back));
        mailbox.wake();
    }
}
