//! Any device that libibverbs drives: rdma_rxe in a virtual machine first of all.
//!
//! ```text
//! VerbsDevice -> VerbsPd -> VerbsRegion (a [`Region`](super::Region))
//!                     -> VerbsSrq, VerbsWindow
//!             -> VerbsChannel -> VerbsCq -> VerbsQp
//! ```
//!
//! Every object holds its parents by `Arc`. Requests, completions, rights and statuses are the words that the model uses, so
//! a program is written once. What is different is who keeps a region true: here the kernel does, with its own notifiers, and
//! this crate sees no page list.
//!
//! What a device can do is asked when it is opened ([`Capabilities`]), and what it cannot do is an error that names the device
//! and the capability ([`VerbsError::Lacks`]), not an errno in the middle of work. Limits are looked at before a call that
//! they would end ([`limits`]).
//!
//! Bindings are rdma-sys's, save for two inline functions that it has wrong on 64 bits: see [`extended`]. A program that has
//! a context or a protection domain of its own hands it over: [`VerbsDevice::from_ibverbs`] and [`VerbsPd::from_ibverbs`] take
//! those of the crate `ibverbs`, [`VerbsDevice::from_context`] and [`VerbsPd::from_pd`] those of C.
//!
//! # In place of what a driver has not
//!
//! [`VerbsHandle`] is a registration that may be changed: by ibv_rereg_mr(3), or by a fresh registration, whose key is another
//! (the library of rdma_rxe in rdma-core 44 has no rereg_mr). It is also how a device without ODP gets pages that came in the
//! place of others. Without ibv_advise_mr(3) (that library before rdma-core 58): [`Region::advise`](super::Region::advise)
//! populates the pages of this process, so that the device's fault finds them there.
//!
//! [`Device`](super::Device) and what it leads to are not implemented here, but for [`Region`](super::Region): see the absences in
//! ARCHITECTURE.md.

mod capabilities;
mod context;
mod error;
mod events;
mod extended;
mod handle;
mod handover;
pub mod limits;
mod pd;
mod post;
mod queue;
mod region;
mod register;
mod shared;
mod translate;
mod window;

#[cfg(test)]
mod tests;

pub use capabilities::{Capabilities, Capability, Operations};
pub use context::{VerbsDevice, devices};
pub use error::VerbsError;
pub use events::VerbsChannel;
pub use handle::{Change, Outcome, VerbsHandle};
pub use pd::VerbsPd;
pub use queue::{Terms, VerbsCq, VerbsQp, VerbsQpOptions};
pub use region::VerbsRegion;
pub use shared::VerbsSrq;
pub use window::{Opening, VerbsWindow};
