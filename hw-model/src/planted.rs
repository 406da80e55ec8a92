//! Bugs that are put in on purpose, so that the simulation can show that it finds them. Only with the feature
//! `planted-bugs`, and only once [`plant`] was called; one at a time, for the whole program.

use crate::sync::atomic::{AtomicU8, Ordering};

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Bug {
    /// An invalidation raises the sequence but leaves the entries visible to the device.
    StaleEntry = 1,
    /// Unlinking does not flush, so the IOVA is used again while the IOTLB still knows where it led before.
    IovaBeforeFlush = 2,
    /// A fault asks whether its pages are still good before it takes the region's lock, not under it.
    DecisionOutsideLock = 3,
    /// An invalidation hides the entries and forgets that the device remembers them.
    StaleTranslation = 4,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::StaleEntry, Self::IovaBeforeFlush, Self::DecisionOutsideLock, Self::StaleTranslation];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::StaleEntry => "stale-entry",
            Self::IovaBeforeFlush => "iova-before-flush",
            Self::DecisionOutsideLock => "decision-outside-lock",
            Self::StaleTranslation => "stale-translation",
        }
    }

    /// Whether this is the one that was put in.
    #[must_use]
    pub fn is_planted(self) -> bool {
        PLANTED.load(Ordering::Relaxed) == self as u8
    }
}

static PLANTED: AtomicU8 = AtomicU8::new(0);

/// Puts a bug in, or takes it out again.
pub fn plant(bug: Option<Bug>) {
    PLANTED.store(bug.map_or(0, |bug| bug as u8), Ordering::Relaxed);
}
