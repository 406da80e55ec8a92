//! Who reads what arrives at a port: its receive thread, or those who poll a completion queue.
//!
//! A receive thread that hands packets to a thread which spins all the while costs two wakes and a processor. So those who poll
//! read the port themselves, and while they do so often enough the receive thread sleeps and has nobody wake it, and
//! only looks now and then whether it is still so. Whoever goes to sleep says so before. A program that polls for a while and
//! then spins until a byte of its memory changes says nothing: once a packet has waited for that, the thread reads itself for a
//! time, whoever polls.

use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long the receive thread leaves reading to others before it looks again.
pub(super) const TURN: Duration = Duration::from_millis(1);
/// Polls in that time that are often enough: one who sends large messages polls once for each.
const OFTEN: u32 = 8;
/// How long the receive thread reads itself once others, to whom it was left, let a packet wait.
const GRUDGE: Duration = Duration::from_millis(200);

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

    /// Nobody polls for a while. Whether the receive thread is to be woken.
    pub(super) fn end(&self) -> bool {
        self.polls.store(0, Ordering::SeqCst);
        self.theirs.load(Ordering::SeqCst) && self.theirs.swap(false, Ordering::SeqCst)
    }
}

/// What the receive thread knows of it.
pub(super) struct Watch<'a> {
    turns: &'a Turns,
    /// It was left to others before, and they stopped without a word.
    left_alone: bool,
    /// Before then it is left to nobody.
    reads_until: Option<Instant>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(turns: &'a Turns) -> Self {
        Self { turns, left_alone: false, reads_until: None }
    }

    /// Whether the receive thread may sleep for a [`TURN`] without being woken by what arrives.
    pub(super) fn are_theirs(&mut self, now: Instant) -> bool {
        let Turns { polls, theirs } = self.turns;
        let were_theirs = theirs.load(Ordering::SeqCst);
        if self.reads_until.is_some_and(|until| now < until) {
            return false;
        }
        // Said before the polls are looked at: one who stops in between sees it, and wakes us.
        theirs.store(true, Ordering::SeqCst);
        let often = polls.swap(0, Ordering::SeqCst) >= OFTEN;
        if !often {
            theirs.store(false, Ordering::SeqCst);
            self.left_alone = were_theirs;
        }
        often
    }

    /// While it reads: whether somebody has polled so often that it is to ask [`Watch::are_theirs`].
    pub(super) fn may_be_theirs(&self, now: Instant) -> bool {
        self.turns.polls.load(Ordering::Relaxed) >= OFTEN && self.reads_until.is_none_or(|until| now >= until)
    }

    /// The thread has read, and there was `some`.
    pub(super) fn has_read(&mut self, some: bool, now: Instant) {
        if std::mem::take(&mut self.left_alone) && some {
            self.reads_until = Some(now + GRUDGE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polled(turns: &Turns, times: u32) {
        (0..times).for_each(|_| turns.polled());
    }

    #[test]
    fn reading_is_left_to_others_only_while_they_poll_often() {
        let turns = Turns::default();
        let (mut watch, now) = (Watch::new(&turns), Instant::now());
        assert!(!watch.are_theirs(now), "nobody has polled");
        polled(&turns, OFTEN - 1);
        assert!(!watch.may_be_theirs(now));
        assert!(!watch.are_theirs(now), "one who polls seldom would keep packets waiting");
        polled(&turns, OFTEN);
        assert!(watch.may_be_theirs(now) && watch.are_theirs(now));
        assert!(!watch.may_be_theirs(now) && !watch.are_theirs(now), "nobody has polled since");
    }

    #[test]
    fn one_who_stops_polling_wakes_the_receive_thread_once() {
        let turns = Turns::default();
        let (mut watch, now) = (Watch::new(&turns), Instant::now());
        polled(&turns, OFTEN);
        assert!(!turns.end(), "it reads itself");
        assert!(!watch.are_theirs(now), "the polls of one who sleeps count no more");
        polled(&turns, OFTEN);
        assert!(watch.are_theirs(now));
        assert!(turns.end(), "packets would wait for the end of its turn");
        assert!(!turns.end());
    }

    #[test]
    fn those_who_let_a_packet_wait_are_left_nothing_for_a_time() {
        let turns = Turns::default();
        let (mut watch, now) = (Watch::new(&turns), Instant::now());
        polled(&turns, OFTEN);
        assert!(watch.are_theirs(now));
        assert!(!watch.are_theirs(now), "they poll no more");
        watch.has_read(true, now);
        polled(&turns, OFTEN);
        assert!(!watch.may_be_theirs(now) && !watch.are_theirs(now));
        assert!(watch.may_be_theirs(now + GRUDGE) && watch.are_theirs(now + GRUDGE), "not for ever");
    }

    #[test]
    fn those_who_let_nothing_wait_or_say_that_they_stop_are_left_it_again() {
        let turns = Turns::default();
        let (mut watch, now) = (Watch::new(&turns), Instant::now());
        for (some, says_so) in [(false, false), (true, true)] {
            polled(&turns, OFTEN);
            assert!(watch.are_theirs(now));
            assert_eq!(says_so && turns.end(), says_so);
            assert!(!watch.are_theirs(now));
            watch.has_read(some, now);
        }
        polled(&turns, OFTEN);
        assert!(watch.are_theirs(now));
    }
}
