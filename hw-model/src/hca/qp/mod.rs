//! Reliable-connection queue pairs (IBTA volume 1, 9.7 for the protocol, 10.3 for the states).
//!
//! A queue pair has three parts. [`QueuePair`] is software's handle. `Shared` is what posting threads and the engine both
//! touch: the queue of posted requests, the state. `Core` is the protocol, sans-IO, and belongs to one engine: a
//! `requester` that turns requests into packets and answers into completions, and a `responder` that does what the
//! peer asks.
//!
//! Lock order: engine, then send queue, then completion queue.

mod core;
mod handle;
mod queue;
mod requester;
mod responder;
mod state;
mod transport;

pub(super) use core::{Context, Core, Dma, Next};
pub use handle::{CreateQpError, QpAddress, QpSpec, QueuePair};
pub use state::{IllegalTransition, QpState, Transition};
pub use transport::Transport;
