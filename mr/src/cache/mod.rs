//! A registration cache: memory that was registered once is registered when it is asked for again.
//!
//! ```text
//! get -> front (this thread's table, checked by one generation) -> hit: one count up, one flag read
//!     -> miss: watch, register, put on the shelf, publish a new table
//! ```
//!
//! An entry is a region, found by the interval of memory that it covers. A request is answered by any entry that holds all
//! its bytes and grants at least its rights. What [`Cache::get`] gives is a [`Lease`]; while one lives its region is not
//! deregistered, whatever becomes of the entry.
//!
//! # When memory changes
//!
//! Each entry is an interval of the address space's notifiers beside its region's own. An invalidation that overlaps it does
//! three things before the pages go, and no other:
//!
//! 1. in the clear callback one flag is set, and from then on no request finds the entry, in whichever table it stands;
//! 2. the region clears its own page-list entries, as any region does;
//! 3. in the unlink callback, if nobody has a lease, the region is sealed: it takes no new page, so that what is mapped at
//!    its addresses later is not reached by its key.
//!
//! The object itself goes later, on a thread that asks the cache for something. So a deregistration never runs in a
//! callback, and never has to be waited for before memory may go: by then the key reaches nothing that changed.
//!
//! A region under a lease is not sealed. It goes on following its memory, as a region does that no cache has: somebody is
//! using it, and to drop a page of a buffer is no reason to fail a transfer into another. It is gone with its last lease.
//! The exception is memory whose owner is gone: that is sealed at once, lease or not.
//!
//! # What a hit promises
//!
//! On the rungs exact and owned a change is told of before it happens, so a request that begins after it never finds an
//! entry from before it. A request that runs beside the change may find either, as with any cache: it could have been
//! answered a moment sooner. On the rung events, drops are told of in time; unmaps and moves a little after they happened,
//! and until then the old entry can be found: its region faults in what is there now, so the bytes are right, under the
//! old key. What that rung does not see (mprotect, hole punching, truncation) leaves the entry as it is, and a transfer
//! ends with a status. On the rung poll nothing is told: say [`Cache::forget`] before memory goes. Under an address space of
//! the rungs exact and owned the cache holds no memory: an owner may drop it at any time. Under the others an entry keeps
//! what its range keeps, until it is evicted.
//!
//! # Locks
//!
//! One, the shelf's, over the list of entries. It is not held while anything is registered, deregistered or waited for, and
//! no callback takes it or any other lock of the cache: callbacks read and write flags and counts. A hit takes no lock.
//! So the deadlocks that registration caches are known for (a registration that allocates, whose allocator unmaps, whose
//! notification wants the cache's lock) have nothing to close them.
//!
//! Leases must not be dropped, and the cache not be asked, inside a notifier callback.

mod config;
mod entry;
mod front;
mod miss;
mod registration_cache;
mod shelf;
mod table;
mod tracker;
mod unkept;

#[cfg(all(test, shuttle))]
mod schedules;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

pub use config::{CacheConfig, CacheError, CacheStats, Merging};
pub use entry::Lease;
pub use registration_cache::Cache;
