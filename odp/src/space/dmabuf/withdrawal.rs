//! Taking a buffer back for good, as a value that can be stepped.

use super::buffer::Dmabuf;
use super::points;
use crate::notifier::Invalidation;
use crate::space::Withdrawn;
use hw_model::sync::Arc;
use std::fmt;

/// A buffer on its way back to its exporter. From its beginning no importer is given a page of it; once it has been polled
/// to the end none has one. Dropping it waits: bursts are bounded, so that is soon.
#[must_use = "the memory may be used for something else when it has been polled to the end"]
pub struct Withdrawal {
    buffer: Arc<Dmabuf>,
    /// `None` once done.
    invalidation: Option<Invalidation>,
}

/// Why a buffer cannot be revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevokeError {
    /// Importers have pinned it that were not asked to let go. An exporter that revokes has none
    /// ([`Exporter::revokes`](super::Exporter::revokes)).
    #[error("{by} importers have pinned it for good")]
    Pinned {
        /// Pins in the way.
        by: u64,
    },
    /// It has been withdrawn before.
    #[error(transparent)]
    Withdrawn(#[from] Withdrawn),
}

impl Dmabuf {
    /// The exporter takes the buffer back. Importers lose it for good: dynamic ones and pinned ones that are revocable.
    ///
    /// # Errors
    /// See [`RevokeError`]; never [`RevokeError::Pinned`] if the exporter revokes.
    pub fn begin_revoke(self: &Arc<Self>) -> Result<Withdrawal, RevokeError> {
        {
            let mut book = self.book.lock();
            if let Some(why) = book.withdrawn {
                return Err(why.into());
            }
            let by = book.pins.iter().filter(|pin| !pin.revocable).count() as u64;
            if by > 0 {
                return Err(RevokeError::Pinned { by });
            }
            book.withdrawn = Some(Withdrawn::Revoked);
        }
        Ok(self.withdraw())
    }

    /// The exporter's device is gone, whoever has pinned its memory.
    pub fn begin_remove(self: &Arc<Self>) -> Withdrawal {
        self.book.lock().withdrawn = Some(Withdrawn::Removed);
        self.withdraw()
    }

    /// [`Dmabuf::begin_revoke`], waiting for its end.
    ///
    /// # Errors
    /// See [`RevokeError`].
    pub fn revoke(self: &Arc<Self>) -> Result<(), RevokeError> {
        self.begin_revoke().map(drop)
    }

    fn withdraw(self: &Arc<Self>) -> Withdrawal {
        // Nothing to fail: it only lets a test in.
        let _ = self.points.meet(points::WITHDRAW);
        let invalidation = Some(self.notifiers().begin_invalidation(self.range()));
        Withdrawal { buffer: Arc::clone(self), invalidation }
    }
}

impl Withdrawal {
    /// Whether every importer has let go. Never waits, not for bytes that the exporter itself is moving either: where those
    /// are it knows best.
    pub fn poll(&mut self) -> bool {
        let Some(invalidation) = &mut self.invalidation else { return true };
        if !invalidation.poll() {
            return false;
        }
        drop(self.invalidation.take());
        self.buffer.exporter().withdrawn();
        true
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        if let Some(invalidation) = &mut self.invalidation {
            invalidation.wait();
        }
        self.poll();
    }
}

impl fmt::Debug for Withdrawal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Withdrawal").field("invalidation", &self.invalidation).finish_non_exhaustive()
    }
}
