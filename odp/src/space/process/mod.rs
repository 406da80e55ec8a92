//! The real memory of this process, unprivileged.
//!
//! A process does not know where its pages are, and nobody tells it before they go. This space makes up for both:
//!
//! * **Frames.** A physical address is a virtual page and a generation; an invalidation retires the generation, and DMA
//!   through a retired frame is refused and counted. Bytes are reached through the virtual address, so what a device
//!   sees is what the program sees. Memory that we own has frames of its own, reached through a second mapping.
//! * **Changes.** A ladder ([`Rung`](crate::space::Rung)). Where [`Exact`] is installed, every call that takes pages away is
//!   bracketed. Every change of memory that we own goes through us. Of other memory userfaultfd in asynchronous
//!   write-protect mode reports drops before the page goes, unmaps and moves after; where it cannot be had, or refuses a
//!   mapping (a read-only shared file, memory under another userfaultfd), mappings are compared before each burst. On
//!   these two rungs mprotect, truncation, hole punching, shmdt and guard pages are reported by nobody: a copy that finds
//!   its memory gone has the page invalidated, and the next fault says what is wrong.
//! * **Contents.** Which mapping, from PROCMAP_QUERY; which pages, from PAGEMAP_SCAN; faulting in with MADV_POPULATE,
//!   which gives an error where a touch would raise a signal.
//! * **Copying.** A routine whose faults a signal handler turns into a short count: memory may go at any instruction.
//!
//! * **Pins.** Pages are locked or pinned on request only ([`PinKind`](crate::space::PinKind)).
//!
//! What is not promised: a page dropped right after its event was read may be faulted
//! in, reported, and dropped once more without a word. The frame then still names the page's virtual address, and what is
//! read there is what the program would read.
//!
//! After fork(2) the space belongs to the parent: in the child it refuses watches and reports no pages.

mod bar;
mod bell;
mod bracketed;
mod capabilities;
mod copy;
mod coverage;
mod cpu_access;
mod dmabuf;
mod exact;
mod exported;
mod fork;
mod frames;
mod layout;
mod mappings;
mod memory;
mod monitor;
mod owned;
mod pin;
mod polled;
mod recover;
mod scan;
mod segments;
mod space;
mod sys;
#[cfg(test)]
mod tests;
mod view;
mod walk;
mod watch;

pub use bar::BarMemory;
pub use capabilities::{Capabilities, OpenError, Options, Support};
pub use copy::CopyMethod;
pub use cpu_access::CpuAccess;
pub use dmabuf::{DmabufError, DmabufMapping, PeerPart};
pub use exact::{Exact, InstallError};
pub use exported::{FileExport, FileExportError};
pub use layout::{ContiguousMemory, LayoutError, Mappings, Piece};
pub use owned::{OwnedError, OwnedMemory};
pub use space::{ProcessSpace, ProcessStats, Weakness};
pub use view::LentRange;
