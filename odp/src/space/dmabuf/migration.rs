//! Pages of a [`Migrating`] exporter on their way, as a value that can be stepped.
//!
//! For each run of pages that are at the other place: move ([`super::Move`]); say that they are at the new place, and that
//! their bytes are on the way; copy, a page a step; signal. A copy that fails puts the pages that were not copied back
//! where their bytes are: nobody has been given them meanwhile.

use super::fence::{Fence, FenceSignal};
use super::migrating::{AccessError, Migrating, PagePlace};
use super::moving::{Move, MoveError};
use super::points;
use crate::fault::Progress;
use hw_model::addr::PAGE_SIZE;
use hw_model::sync::{Arc, thread};
use std::fmt;
use std::ops::Range;

/// A migration under way. Poll it to its end. Dropped, it leaves pages where they are, but for those whose bytes are on
/// their way already: these it waits for.
#[must_use = "a migration that is not polled moves nothing"]
pub struct Migration {
    exporter: Arc<Migrating>,
    /// Pages that were not looked at yet.
    left: Range<u64>,
    to: PagePlace,
    stage: Stage,
    moved: u64,
    chunk: Box<[u8]>,
}

enum Stage {
    /// Looks for the next run.
    Looking,
    /// Importers are letting go.
    Moving(Box<Move>),
    /// Bytes are on their way.
    Copying(Copying),
}

struct Copying {
    left: Range<u64>,
    _signal: FenceSignal,
}

/// Why a migration ended early. Pages before the one that failed have moved; the rest are where they were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MigrationError {
    /// Pages that cannot be moved now.
    #[error(transparent)]
    Move(#[from] MoveError),
    /// A page that could not be copied.
    #[error("page {page} could not be copied: {reason}")]
    Copy {
        /// The page.
        page: u64,
        /// Why.
        reason: AccessError,
    },
}

impl Migrating {
    /// Begins to bring `pages` to `to`. Those that are there already stay, and nobody is told of them.
    ///
    /// # Errors
    /// [`MoveError::NoSuchPages`].
    pub fn begin_migration(
        self: &Arc<Self>,
        pages: Range<u64>,
        to: PagePlace,
    ) -> Result<Migration, MoveError> {
        let size = self.pages.count();
        if pages.start > pages.end || pages.end > size {
            return Err(MoveError::NoSuchPages { pages, size });
        }
        let chunk = vec![0; PAGE_SIZE as usize].into_boxed_slice();
        Ok(Migration { exporter: Arc::clone(self), left: pages, to, stage: Stage::Looking, moved: 0, chunk })
    }

    /// The same, waiting for its end; how many pages moved. Not to be called while holding a lock that notifier callbacks
    /// take.
    ///
    /// # Errors
    /// See [`MigrationError`].
    pub fn migrate(self: &Arc<Self>, pages: Range<u64>, to: PagePlace) -> Result<u64, MigrationError> {
        let mut migration = self.begin_migration(pages, to)?;
        loop {
            match migration.poll()? {
                Progress::Done(moved) => return Ok(moved),
                Progress::Blocked => thread::yield_now(),
                Progress::Again => {}
            }
        }
    }
}

impl Migration {
    /// One step; never waits. Gives how many pages moved when there is nothing left to do.
    ///
    /// # Errors
    /// See [`MigrationError`]. It has ended then.
    pub fn poll(&mut self) -> Result<Progress<u64>, MigrationError> {
        match &mut self.stage {
            Stage::Looking => {
                let Some(run) = self.next_run() else { return Ok(Progress::Done(self.moved)) };
                let begun = self.exporter.buffer().begin_move(run.clone());
                self.left.start = if begun.is_ok() { run.end } else { self.left.end };
                self.stage = Stage::Moving(Box::new(begun?));
                Ok(Progress::Again)
            }
            Stage::Moving(moving) => {
                if !moving.poll() {
                    return Ok(Progress::Blocked);
                }
                let run = moving.pages();
                if run.clone().any(|page| self.exporter.pages.place(page) == self.to) {
                    // An earlier migration had these pages on their way, failed, and left some where they had been: here.
                    self.left.start = run.start;
                    self.stage = Stage::Looking;
                    return Ok(Progress::Again);
                }
                let (fence, signal) = Fence::new();
                // The driver asks for both under the same lock: where a page is, and whether it has arrived.
                let _held = self.exporter.pages.hold();
                self.exporter.pages.put(run.clone(), self.to);
                let copying = Stage::Copying(Copying { left: run, _signal: signal });
                if let Stage::Moving(moving) = std::mem::replace(&mut self.stage, copying) {
                    moving.finish(Some(fence));
                }
                Ok(Progress::Again)
            }
            Stage::Copying(copying) => {
                if copying.left.is_empty() {
                    self.stage = Stage::Looking;
                    return Ok(Progress::Again);
                }
                self.copy_next()
            }
        }
    }

    /// The pages that the poll has told importers to let go of, or that are being copied.
    #[must_use]
    pub fn under_way(&self) -> Option<Range<u64>> {
        match &self.stage {
            Stage::Looking => None,
            Stage::Moving(moving) => Some(moving.pages()),
            Stage::Copying(copying) => Some(copying.left.clone()),
        }
    }

    fn next_run(&self) -> Option<Range<u64>> {
        let elsewhere = |page: &u64| self.exporter.pages.place(*page) != self.to;
        let start = self.left.clone().find(elsewhere)?;
        Some(start..start + (start..self.left.end).take_while(elsewhere).count() as u64)
    }

    fn copy_next(&mut self) -> Result<Progress<u64>, MigrationError> {
        let Stage::Copying(copying) = &mut self.stage else { return Ok(Progress::Again) };
        let page = copying.left.start;
        let pages = &self.exporter.pages;
        let copied = match self.exporter.buffer().points.meet(points::COPY).fails() {
            true => Err(AccessError::Moving { page }),
            false => {
                pages.copy(page, self.to, &mut self.chunk).and_then(|()| pages.leave(page, self.to.other()))
            }
        };
        match copied {
            Ok(()) => {
                copying.left.start += 1;
                self.moved += 1;
                Ok(Progress::Again)
            }
            Err(AccessError::Closed) => Ok(Progress::Blocked),
            Err(reason) => {
                pages.put(copying.left.clone(), self.to.other());
                self.left.start = self.left.end;
                self.stage = Stage::Looking;
                Err(MigrationError::Copy { page, reason })
            }
        }
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        while matches!(&self.stage, Stage::Copying(copying) if !copying.left.is_empty()) {
            if matches!(self.copy_next(), Ok(Progress::Blocked)) {
                thread::yield_now();
            }
        }
    }
}

impl fmt::Debug for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Migration")
            .field("left", &self.left)
            .field("to", &self.to)
            .field("moved", &self.moved)
            .field("under_way", &self.under_way())
            .finish_non_exhaustive()
    }
}
