//! Implicit regions: all memory of an address space behind one key, kept only where devices use it.
//!
//! The key's range is cut into slots of 1 GiB. A slot that a device faults in gets a region of its own, a child, with page
//! list, IOVA and interval, and its key is put into the slot; so a child is an on-demand region in every respect, and
//! faults, invalidations and relinking know nothing of implicit ones. When an invalidation leaves a child empty, a bell is
//! rung, and whoever hears it takes the child away: the slot first, then the key, then as any region.
//!
//! The slots' lock, `Slots`, is taken by faults, by who takes children away and by deregistration; never by an invalidation.
//! Lock order: the slots, then a child's `Core::state`.
//!
//! Kernel: drivers/infiniband/hw/mlx5/odp.c, `implicit_get_child_mr` and `free_implicit_child_mr_work`.

mod children;
mod region;
#[cfg(all(test, shuttle))]
mod schedules;

pub(super) use children::{ChildUse, Children};
pub use region::{ImplicitRegion, ImplicitTeardown};
