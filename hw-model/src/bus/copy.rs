//! Memory to memory in one copy, from where one device reaches it to where another does.
//!
//! Pieces are handed over as page lists name them. What goes on at both ends is kept together and copied in one piece: pages
//! of one mapping of a process, of one large leaf, which is translated once. For RAM of one memory nothing lies between; a BAR, a
//! bounce slot or another memory costs a buffer on the stack.

use super::memory::{CopyEnd, CopyError, MemoryError};
use super::port::{DmaError, DmaPort, Target};
use crate::addr::{DmaAddr, PAGE_SIZE, PhysAddr};
use crate::iommu::DmaAccess;
use crate::sync::Arc;

/// A copy under way. The caller is inside the [`DmaEpoch`](super::DmaEpoch) of both ends.
pub struct DmaCopy<'a> {
    source: &'a DmaPort,
    target: &'a DmaPort,
    one_memory: bool,
    /// What has not been copied yet, and goes on at both ends.
    run: Option<Run>,
    /// Bytes before the run.
    done: u64,
}

#[derive(Clone, Copy)]
struct Run {
    from: PhysAddr,
    to: PhysAddr,
    len: usize,
}

impl<'a> DmaCopy<'a> {
    /// From what `source` reaches to what `target` reaches.
    #[must_use]
    pub fn new(source: &'a DmaPort, target: &'a DmaPort) -> Self {
        let one_memory = Arc::ptr_eq(source.memory(), target.memory());
        Self { source, target, one_memory, run: None, done: 0 }
    }

    /// Goes on with `len` bytes.
    ///
    /// # Errors
    /// See [`CopyError`]; what came before may have been copied or not.
    #[inline]
    pub fn add(&mut self, from: DmaAddr, to: DmaAddr, len: usize) -> Result<(), CopyError<DmaError>> {
        let mut added = 0;
        while added < len {
            let (from, to) = (from.offset(added as u64), to.offset(added as u64));
            added += self.add_stretch(from, to, len - added)?;
        }
        Ok(())
    }

    /// Goes on with as many bytes as are translated at once at both ends. Gives how many.
    #[inline]
    fn add_stretch(&mut self, from: DmaAddr, to: DmaAddr, len: usize) -> Result<usize, CopyError<DmaError>> {
        let at = self.done + self.run.map_or(0, |run| run.len as u64);
        let fail = |end| move |error| CopyError { end, done: at, error };
        let (source, len) = self.source.stretch(from, len, DmaAccess::Read).map_err(fail(CopyEnd::Source))?;
        let (target, len) = self.target.stretch(to, len, DmaAccess::Write).map_err(fail(CopyEnd::Target))?;
        match (&source, &target) {
            (Target::Memory(from), Target::Memory(to)) if self.one_memory => {
                let goes_on = |run: &Run| {
                    run.from.offset(run.len as u64) == *from && run.to.offset(run.len as u64) == *to
                };
                match &mut self.run {
                    Some(run) if goes_on(run) => run.len += len,
                    _ => {
                        self.copy_run()?;
                        self.run = Some(Run { from: *from, to: *to, len });
                    }
                }
                Ok(len)
            }
            _ => {
                let left = |at: DmaAddr| (PAGE_SIZE - at.page_offset()) as usize;
                let len = len.min(left(from)).min(left(to));
                self.add_through_buffer(&source, &target, len)?;
                Ok(len)
            }
        }
    }

    #[cold]
    fn add_through_buffer(
        &mut self,
        source: &Target<'_>,
        target: &Target<'_>,
        len: usize,
    ) -> Result<(), CopyError<DmaError>> {
        self.copy_run()?;
        let mut buffer = [0; PAGE_SIZE as usize];
        let bytes = &mut buffer[..len];
        let done = self.done;
        let fail = |end| move |error: MemoryError| CopyError { end, done, error: error.into() };
        source.read(self.source.memory(), bytes).map_err(fail(CopyEnd::Source))?;
        target.write(self.target.memory(), bytes).map_err(fail(CopyEnd::Target))?;
        self.done += len as u64;
        Ok(())
    }

    fn copy_run(&mut self) -> Result<(), CopyError<DmaError>> {
        let Some(Run { from, to, len }) = self.run.take() else { return Ok(()) };
        self.source.memory().copy(from, to, len).map_err(|error| CopyError {
            end: error.end,
            done: self.done + error.done,
            error: error.error.into(),
        })?;
        self.done += len as u64;
        Ok(())
    }

    /// Copies what is left. All bytes are in their place when this returns.
    ///
    /// # Errors
    /// See [`CopyError`]; a prefix may have been placed then.
    pub fn finish(mut self) -> Result<(), CopyError<DmaError>> {
        self.copy_run()
    }
}

impl std::fmt::Debug for DmaCopy<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmaCopy").field("done", &self.done).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
