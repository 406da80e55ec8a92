//! DMABUFs: memory that one device exports and others import, page by page, without a scatterlist.
//!
//! A buffer ([`Dmabuf`]) is what an exporter gives and importers attach to. An attachment ([`DmabufSpace`]) is an address
//! space whose addresses are offsets into the buffer: what a region needs of memory (walks, faults, notice before pages
//! go, teardown) it has of a DMABUF by the same interface, and a registration is a
//! [`UserRange`](super::UserRange) over it. Where pages are is said in physical ranges ([`Piece`]), each of one provider;
//! nothing is ever gathered in a list.
//!
//! # The protocol of a move (include/linux/dma-buf.h, `struct dma_buf_attach_ops`, `invalidate_mappings`)
//!
//! 1. The exporter begins a [`Move`]: every importer is told and hides the pages (one notifier registry a buffer, so there
//!    is one drain, however many importers and devices there are).
//! 2. DMA that was under way ends: a [`Fence`] that the exporter may wait for. Bursts are bounded, so this is too.
//! 3. Importers unmap, and [`Move::poll`] says so.
//! 4. The exporter names the new place ([`Move::finish`]), with a fence of its own if the bytes are still on their way. Until
//!    it signals, nobody is given the pages: a fault waits for it, with a bound, or says busy.
//! 5. Importers fault the pages in again where they are now: another path and another page size, maybe.
//!
//! # Importers
//!
//! [`ImportMode::Dynamic`] takes part in moves. [`ImportMode::Pinned`] keeps what it watches where it is: a move of that
//! fails, and says how many are in the way. [`ImportMode::PinnedRevocable`] does too, but lets go for good when the exporter
//! revokes; an exporter that wants to be able to ([`Exporter::revokes`]) refuses importers that would not.
//!
//! [`Dmabuf::begin_revoke`] and [`Dmabuf::begin_remove`] (the exporter's device is gone) end a buffer in bounded time. Every
//! fault in it fails from then on with [`FaultError::Withdrawn`](super::FaultError::Withdrawn). Regions over it keep their
//! keys until they are deregistered, and every access through them is refused.
//!
//! # Locks
//!
//! One a buffer, over who is attached, pins and moves: a leaf. Neither exporters nor notifier callbacks are called under it.

mod attachment;
mod bar;
mod buffer;
mod exporter;
mod fence;
mod migrating;
mod migration;
mod moving;
pub mod points;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
mod withdrawal;

pub use attachment::{DmabufSpace, ImportMode, ImportOptions};
pub use bar::{BarExport, BarPart, OutsideBar};
pub use buffer::{AttachError, Dmabuf, DmabufStats};
pub use exporter::{Exporter, MapRefusal, Piece};
pub use fence::{Fence, FenceSignal};
#[cfg(all(target_os = "linux", not(any(loom, shuttle))))]
pub(in crate::space) use migrating::Pages;
pub use migrating::{AccessError, ExportError, Migrating, MigratingOptions, PagePlace, SystemPages};
pub use migration::{Migration, MigrationError};
pub use moving::{Move, MoveError};
pub use withdrawal::{RevokeError, Withdrawal};
