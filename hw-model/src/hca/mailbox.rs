//! What others leave for an engine: packets, doorbells, answers to page faults.

use super::fault::{FaultOutcome, FaultToken};
use super::loan::GivenBack;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::wire::{Packet, Qpn};
use crossbeam::sync::Unparker;
use std::collections::VecDeque;

/// One engine's mailbox.
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    waiting: AtomicBool,
    /// The device has gone. Changed under the lock of `mail`.
    closed: AtomicBool,
    /// When the engine's thread means to wake by itself, in nanoseconds; [`RUNNING`] while it is awake or does not exist.
    asleep_until: AtomicU64,
    thread: Unparker,
}

/// The value of `asleep_until` that is earlier than every deadline.
const RUNNING: u64 = 0;

/// What is in a mailbox. The engine swaps it for an empty one, so a steady state allocates nothing.
#[derive(Default)]
pub(super) struct Mail {
    pub(super) packets: VecDeque<Packet>,
    pub(super) doorbells: Vec<Qpn>,
    pub(super) answers: Vec<(FaultToken, FaultOutcome)>,
    pub(super) given_back: Vec<GivenBack>,
    /// The table of partition keys is another.
    pub(super) pkeys_changed: bool,
    /// The device has failed.
    pub(super) failed: bool,
}

impl Mailbox {
    pub(super) fn new(thread: Unparker) -> Self {
        Self {
            mail: Mutex::new(Mail::default()),
            waiting: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            asleep_until: AtomicU64::new(RUNNING),
            thread,
        }
    }

    /// Leaves something. Does not wake anybody.
    pub(super) fn leave(&self, put: impl FnOnce(&mut Mail)) {
        let mut mail = self.mail.lock();
        if self.closed.load(Ordering::Relaxed) {
            // What was to be put goes with `put`, after the lock.
            drop(mail);
            return;
        }
        put(&mut mail);
        self.announce();
    }

    /// Leaves a packet, which is large: it is moved once.
    pub(super) fn leave_packet(&self, packet: Packet) {
        let mut mail = self.mail.lock();
        if self.closed.load(Ordering::Relaxed) {
            drop(mail);
            return;
        }
        mail.packets.push_back(packet);
        self.announce();
    }

    /// Says that there is mail, under its lock.
    #[inline]
    fn announce(&self) {
        // It is false only if nothing was left since it was collected, which is said under this lock too. Who left that has
        // stored it before.
        if !self.waiting.load(Ordering::Relaxed) {
            self.waiting.store(true, Ordering::SeqCst);
        }
    }

    /// Has the engine's thread go on with what another thread left undone.
    pub(super) fn remind(&self) {
        self.waiting.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Takes nothing any more, and drops what there is: nobody will collect it.
    pub(super) fn close(&self) {
        let mut mail = self.mail.lock();
        self.closed.store(true, Ordering::Relaxed);
        let left = std::mem::take(&mut *mail);
        drop(mail);
        drop(left);
    }

    /// Takes all there is in exchange for `empty`.
    pub(super) fn collect(&self, empty: &mut Mail) {
        let mut mail = self.mail.lock();
        self.waiting.store(false, Ordering::SeqCst);
        std::mem::swap(&mut *mail, empty);
    }

    pub(super) fn has_mail(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Wakes the engine's thread if it sleeps. What was left before is seen by it.
    pub(super) fn wake(&self) {
        self.wake_for(RUNNING);
    }

    /// Wakes the engine's thread if it sleeps beyond `deadline`.
    pub(super) fn wake_for(&self, deadline: u64) {
        if self.asleep_until.load(Ordering::SeqCst) > deadline {
            self.thread.unpark();
        }
    }

    /// The engine's thread says that it goes to sleep. It looks at the mail once more before it does.
    pub(super) fn going_to_sleep(&self, until: u64) {
        self.asleep_until.store(until.max(RUNNING + 1), Ordering::SeqCst);
    }

    /// Wakes the engine's thread in any case: it is to end.
    pub(super) fn stop(&self) {
        self.thread.unpark();
    }

    pub(super) fn awake(&self) {
        self.asleep_until.store(RUNNING, Ordering::SeqCst);
    }
}
