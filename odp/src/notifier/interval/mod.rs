//! The intervals of one address space, found by overlap.
//!
//! A treap keyed by (start, id) in which each node knows the largest last address below it. Nodes are boxed by the caller
//! before the lock is taken and handed back to be freed after it is released. Ranges are kept by their last address, so
//! one that ends at the top of the address space needs no special case. Overlapping, nested and identical ranges are
//! ordinary.

mod treap;

pub(super) use treap::{Key, Node, Tree};

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
