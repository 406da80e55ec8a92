//! A move of pages, as a value that can be stepped.

use super::buffer::{Dmabuf, overlap, range_of};
use super::fence::{Fence, until};
use super::points;
use crate::notifier::Invalidation;
use crate::space::Withdrawn;
use hw_model::sync::Arc;
use hw_model::sync::atomic::Ordering;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// A move under way. Importers have been told; [`Move::poll`] until they have let go, put the pages elsewhere, and
/// [`Move::finish`]. Dropped, it moves nothing: importers fault the pages in again where they are.
#[must_use = "pages may be put elsewhere once the move is ready"]
pub struct Move {
    buffer: Arc<Dmabuf>,
    pages: Range<u64>,
    /// `None` only while finishing.
    invalidation: Option<Invalidation>,
    released: bool,
}

/// Why pages cannot be moved now. Nobody has been told of anything then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoveError {
    /// No pages, or pages beyond the end.
    #[error("pages {} to {} are not in a buffer of {size} pages", pages.start, pages.end)]
    NoSuchPages {
        /// Pages asked for.
        pages: Range<u64>,
        /// Pages there are.
        size: u64,
    },
    /// Importers have pinned some of them.
    #[error("pages {} to {} are pinned by {by}", pages.start, pages.end)]
    Pinned {
        /// Pages asked for.
        pages: Range<u64>,
        /// Pins in the way.
        by: u64,
    },
    /// Another move has some of them.
    #[error("pages {} to {} are being moved already", pages.start, pages.end)]
    Moving {
        /// Pages asked for.
        pages: Range<u64>,
    },
    /// The buffer has been withdrawn.
    #[error(transparent)]
    Withdrawn(#[from] Withdrawn),
    /// The exporter has nowhere to put them.
    #[error("no memory to move pages {} to {} to", pages.start, pages.end)]
    OutOfMemory {
        /// Pages asked for.
        pages: Range<u64>,
    },
}

impl Dmabuf {
    /// Begins a move of `pages`: importers hide them (`dma_buf_invalidate_mappings`). For exporters; where the pages go is
    /// their business.
    ///
    /// # Errors
    /// See [`MoveError`].
    pub fn begin_move(self: &Arc<Self>, pages: Range<u64>) -> Result<Move, MoveError> {
        let size = self.pages();
        if pages.is_empty() || pages.end > size {
            return Err(MoveError::NoSuchPages { pages, size });
        }
        if self.points.meet(points::MOVE).fails() {
            return Err(MoveError::OutOfMemory { pages });
        }
        {
            let mut book = self.book.lock();
            if let Some(why) = book.withdrawn {
                return Err(why.into());
            }
            let by = book.pins.iter().filter(|pin| overlap(&pin.pages, &pages)).count() as u64;
            if by > 0 {
                self.counters.moves_refused.fetch_add(1, Ordering::Relaxed);
                return Err(MoveError::Pinned { pages, by });
            }
            if book.is_moving(&pages) {
                return Err(MoveError::Moving { pages });
            }
            book.moving.push(pages.clone());
        }
        let invalidation = Some(self.notifiers().begin_invalidation(range_of(&pages)));
        Ok(Move { buffer: Arc::clone(self), pages, invalidation, released: false })
    }
}

impl Move {
    /// The pages.
    #[must_use]
    pub fn pages(&self) -> Range<u64> {
        self.pages.clone()
    }

    /// Signals when the importers' DMA that is under way now has ended: what an exporter's own queue can wait for. They
    /// unmap after it, in [`Move::poll`].
    #[must_use]
    pub fn in_flight(&self) -> Fence {
        self.buffer.in_flight()
    }

    /// Whether the pages may be put elsewhere: every importer has unmapped them, and bytes that an earlier move sent have
    /// arrived. Never waits.
    pub fn poll(&mut self) -> bool {
        let Some(invalidation) = &mut self.invalidation else { return true };
        self.released = self.released || invalidation.poll();
        self.released && self.buffer.arriving(&self.pages).is_none()
    }

    /// Polls until ready, but at most for about `timeout`; whether it is.
    #[must_use]
    pub fn wait(&mut self, timeout: Duration) -> bool {
        until(timeout, || self.poll())
    }

    /// The pages are elsewhere: [`Exporter::piece`](super::Exporter::piece) says where. Their bytes are there once `arrived`
    /// signals; without one they are there now.
    ///
    /// # Panics
    /// If it is not ready: pages were put elsewhere under a device.
    pub fn finish(mut self, arrived: Option<Fence>) {
        assert!(self.poll(), "pages {:?} were moved before their importers let go", self.pages);
        let counters = &self.buffer.counters;
        counters.moves.fetch_add(1, Ordering::Relaxed);
        counters.pages_moved.fetch_add(self.pages.end - self.pages.start, Ordering::Relaxed);
        if let Some(fence) = arrived {
            self.buffer.book.lock().arriving.push((self.pages.clone(), fence));
        }
    }
}

impl Drop for Move {
    /// Ends the invalidation: importers may fault again.
    fn drop(&mut self) {
        let mut book = self.buffer.book.lock();
        let index = book.moving.iter().position(|pages| *pages == self.pages);
        book.moving.swap_remove(index.expect("under way until now"));
        drop(book);
        drop(self.invalidation.take());
    }
}

impl fmt::Debug for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Move")
            .field("pages", &self.pages)
            .field("invalidation", &self.invalidation)
            .finish_non_exhaustive()
    }
}
