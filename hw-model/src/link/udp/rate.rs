//! How fast we send to one address: as fast as the line, until a congestion notification says otherwise (A17.9.3).
//!
//! Sans-IO: time is an argument. The specification asks the sender to slow down and leaves the rest open; this is the way of
//! DCQCN (Zhu et al., SIGCOMM 2015), with its constants: each notification takes away a part of the rate that is as large as
//! notifications have been frequent lately, and what was taken comes back in halves, then in small steps.

use crate::hca::Time;

/// Bytes that may go out at once after a pause.
const BURST: u64 = 256 << 10;
/// The rate is cut at most once in this time, and raised once in it.
const PERIOD_NS: u64 = 55_000;
/// Raises that go half of the way to the rate before the cut; those after it go further up by [`STEP`].
const HALVES: u32 = 5;
/// Bytes a second.
const STEP: u64 = 5 << 20;
/// Below this nothing is cut: bytes a second.
const LEAST: u64 = 1 << 20;
/// How fast `alpha` follows: one part in so many.
const FOLLOW: u64 = 16;
/// `alpha` when every period has a notification.
const WHOLE: u64 = 1 << 10;

/// The pace of what is sent to one address.
#[derive(Clone, Debug)]
pub(super) struct Rate {
    line: u64,
    current: u64,
    target: u64,
    /// How congested the way is, of [`WHOLE`].
    alpha: u64,
    raises: u32,
    cut_at: Time,
    raised_at: Time,
    /// Bytes that may go out, as of `filled_at`; below zero after a burst that was larger.
    credit: i64,
    filled_at: Time,
}

impl Rate {
    /// `line` bytes a second, from `now` on.
    pub(super) fn new(line: u64, now: Time) -> Self {
        Self {
            line,
            current: line,
            target: line,
            alpha: WHOLE,
            raises: 0,
            cut_at: Time(0),
            raised_at: now,
            credit: BURST as i64,
            filled_at: now,
        }
    }

    /// Bytes a second at the moment.
    #[cfg(test)]
    fn current(&self) -> u64 {
        self.current
    }

    /// A notification has come.
    pub(super) fn notified(&mut self, now: Time) {
        self.raise(now);
        if now.0 < self.cut_at.after(PERIOD_NS).0 && self.cut_at != Time(0) {
            return;
        }
        self.cut_at = now;
        self.raised_at = now;
        self.raises = 0;
        self.target = self.current;
        self.current = (self.current - self.current * self.alpha / WHOLE / 2).max(LEAST.min(self.line));
        self.alpha += (WHOLE - self.alpha).div_ceil(FOLLOW);
    }

    /// Whether something may go out now, else when. What goes out is told to [`Rate::spend`].
    pub(super) fn admit(&mut self, now: Time) -> Result<(), Time> {
        self.raise(now);
        let passed = now.0.saturating_sub(self.filled_at.0);
        let earned = u128::from(passed) * u128::from(self.current) / 1_000_000_000;
        if earned > 0 {
            self.filled_at = now;
            self.credit = self.credit.saturating_add(earned.min(1 << 40) as i64).min(BURST as i64);
        }
        if self.credit >= 0 {
            return Ok(());
        }
        let owed = u128::from(self.credit.unsigned_abs()) * 1_000_000_000;
        Err(now.after((owed / u128::from(self.current.max(1))) as u64 + 1))
    }

    /// So many bytes go out.
    pub(super) fn spend(&mut self, bytes: usize) {
        self.credit -= bytes as i64;
    }

    fn raise(&mut self, now: Time) {
        if self.current >= self.line {
            self.raised_at = now;
            return;
        }
        let mut periods = now.0.saturating_sub(self.raised_at.0) / PERIOD_NS;
        self.raised_at = self.raised_at.after(periods * PERIOD_NS);
        // After a long silence the line is free again; counting on would only take time.
        if periods > 10_000 {
            *self = Self { credit: self.credit, filled_at: self.filled_at, ..Self::new(self.line, now) };
            return;
        }
        while periods > 0 && self.current < self.line {
            periods -= 1;
            self.alpha -= self.alpha / FOLLOW;
            self.raises += 1;
            if self.raises > HALVES {
                self.target = (self.target + STEP).min(self.line);
            }
            self.current = (self.current + self.target).div_ceil(2).min(self.line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: u64 = 1 << 30;

    #[test]
    fn a_notification_slows_down_and_silence_speeds_up_again() {
        let mut rate = Rate::new(LINE, Time(0));
        rate.notified(Time(1_000_000));
        let cut = rate.current();
        assert!(cut <= LINE / 2, "the first notification takes half: {cut}");
        rate.notified(Time(1_010_000));
        assert_eq!(rate.current(), cut, "notifications of one moment are one");
        rate.notified(Time(1_100_000));
        assert!(rate.current() < LINE * 3 / 4, "two in a row go lower: {}", rate.current());
        rate.admit(Time(2_000_000)).expect("nothing was sent");
        assert!(rate.current() > cut, "it comes back: {}", rate.current());
        rate.admit(Time(2_000_000_000)).expect("nothing was sent");
        assert_eq!(rate.current(), LINE);
    }

    #[test]
    fn what_is_sent_too_fast_waits_as_long_as_the_rate_says() {
        let mut rate = Rate::new(1 << 20, Time(0));
        rate.admit(Time(0)).expect("a burst may go");
        rate.spend(BURST as usize + (1 << 20));
        let wait = rate.admit(Time(0)).expect_err("a second's worth is owed");
        assert!((wait.0).abs_diff(1_000_000_000) < 1_000, "{wait:?}");
        rate.admit(Time(500_000_000)).expect_err("half is still owed");
        rate.admit(wait).expect("paid");
    }

    #[test]
    fn no_number_of_notifications_stops_it() {
        let mut rate = Rate::new(LINE, Time(0));
        for period in 1..10_000 {
            rate.notified(Time(period * PERIOD_NS));
        }
        assert!(rate.current() >= LEAST, "{}", rate.current());
    }
}
