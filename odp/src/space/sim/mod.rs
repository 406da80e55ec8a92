//! The simulated address space: frames, page tables and files in plain Rust, with real bytes.
//!
//! One [`SimHost`] is one machine: its RAM in frames of 4 KiB that are given out scattered, its device memories, its files
//! and shared memory objects, and its processes, each a [`SimSpace`]. Everything random comes from one seed. A page is
//! moved, swapped, copied, punched out and given back as a kernel does it, and a frame that was given back is filled with a
//! pattern and refuses DMA, so a translation that outlived its page shows: as [`MemoryError::Retired`], or as wrong bytes
//! once the frame has a new owner.
//!
//! What takes a page away is a [`SimOp`]: it begins the invalidations it needs, in every process that maps the page, is
//! polled until they are drained and unlinked, and only then changes anything. So one thread can put the steps of an engine
//! between any two steps of a change. [`SimOp::run`] is the loop around that for threads. Copy-on-write and the return of a
//! page from device memory are such changes too; a fault that needs one waits for it, or, on a host that is stepped
//! ([`FaultMode::Park`]), leaves it with [`SimHost::poll_parked`] and says busy.
//!
//! # Locks
//!
//! One: the host's kernel lock, over all that is not bytes. Invalidations are begun, polled and ended without it, so
//! notifier callbacks never run under it. What is affected is computed again under the lock before a change is made; if it
//! has grown meanwhile, more invalidations come first. DMA takes no lock at all.
//!
//! [`MemoryError::Retired`]: hw_model::bus::MemoryError::Retired

mod change;
mod check;
mod fault;
mod frames;
mod host;
mod kernel;
mod map;
mod migrate;
mod object;
mod object_change;
mod op;
mod pin;
mod process;
mod span;
mod store;
mod view;
mod vma;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

pub use change::SpaceChange;
pub use check::Broken;
pub use host::{FaultMode, HostStats, SimConfig, SimHost};
pub use kernel::MmId;
pub use object::{ObjectId, Residence};
pub use object_change::ObjectChange;
pub use op::{Outcome, SimError, SimOp};
pub use pin::SimPin;
pub use process::SimSpace;
pub use span::HUGE_PAGES;
pub use store::{DeviceKind, DeviceMemory, DeviceMemoryId};
pub use view::DeviceView;
pub use vma::{Encryption, MapRequest, Protection, Source};
