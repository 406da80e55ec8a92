//! Who reads what arrives at a port: its receive thread, or those who poll a completion queue.
//!
//! A receive thread that hands packets to a thread which spins all the while costs two wakes and a processor. So those who poll
//! read the port themselves, and while they do so often enough the receive thread sleeps and has nobody wake it, and
//! only looks now and then whether it is still so. Whoever goes to sleep says so before.

use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// How long the receive thread leaves reading to others before it looks again.
pub(super) const TURN: Duration = Duration::from_millis(1);
/// Polls in that time that are often enough: one who sends large messages polls once for each.
const OFTEN: u32 = 8;

/// Whose turn it is.
#[derive(Default)]
pub(super) struct Turns {
    /// Polls since the receive thread has looked.
    polls: AtomicU32,
    /// The receive thread leaves reading to others.
    theirs: AtomicBool,
}

impl Turns {
    /// Somebody polls.
    pub(super) fn polled(&self) {
        // Counted on beyond what is looked for, the line would go from one processor to the other for nothing.
        if self.polls.load(Ordering::Relaxed) < OFTEN {
            self.polls.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Asked by the receive thread: whether it may sleep for a [`TURN`] without being woken by what arrives.
    pub(super) fn are_theirs(&self) -> bool {
        // Said before the polls are looked at: one who stops in between sees it, and wakes us.
        self.theirs.store(true, Ordering::SeqCst);
        let often = self.polls.swap(0, Ordering::SeqCst) >= OFTEN;
        if !often {
            self.theirs.store(false, Ordering::SeqCst);
        }
        often
    }

    /// Asked by the receive thread while it reads: whether somebody has polled so often that it is to ask [`Turns::are_theirs`].
    pub(super) fn may_be_theirs(&self) -> bool {
        self.polls.load(Ordering::Relaxed) >= OFTEN
    }

    /// Nobody polls for a while. Whether the receive thread is to be woken.
    pub(super) fn end(&self) -> bool {
        self.polls.store(0, Ordering::SeqCst);
        self.theirs.load(Ordering::SeqCst) && self.theirs.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_is_left_to_others_only_while_they_poll_often() {
        let turns = Turns::default();
        assert!(!turns.are_theirs(), "nobody has polled");
        (1..OFTEN).for_each(|_| turns.polled());
        assert!(!turns.may_be_theirs());
        assert!(!turns.are_theirs(), "one who polls seldom would keep packets waiting");
        (0..OFTEN).for_each(|_| turns.polled());
        assert!(turns.may_be_theirs() && turns.are_theirs());
        assert!(!turns.may_be_theirs() && !turns.are_theirs(), "nobody has polled since");
    }

    #[test]
    fn one_who_stops_polling_wakes_the_receive_thread_once() {
        let turns = Turns::default();
        (0..OFTEN).for_each(|_| turns.polled());
        assert!(!turns.end(), "it reads itself");
        assert!(!turns.are_theirs(), "the polls of one who sleeps count no more");
        (0..OFTEN).for_each(|_| turns.polled());
        assert!(turns.are_theirs());
        assert!(turns.end(), "packets would wait for the end of its turn");
        assert!(!turns.end());
    }
}
