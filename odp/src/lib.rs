//! How memory moves: address spaces, interval notifiers, the fault handler. HMM for a user process.
//!
//! An [`AddressSpace`](space::AddressSpace) says what a range of virtual memory is made of, faults pages in, and tells
//! whoever registered with its [`Notifiers`](notifier::Notifiers) before a page goes away. It knows nothing of regions,
//! keys or page lists.

pub mod fault;
pub mod notifier;
pub mod page;
pub mod prefetch;
pub mod space;
