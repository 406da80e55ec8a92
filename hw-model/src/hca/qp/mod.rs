//! Queue pairs (IBTA volume 1, 9.7 and 9.8 for the protocol, 10.2.4 and 10.3 for the objects and their states).
//!
//! A queue pair has three parts. [`QueuePair`] is software's handle. `Shared` is what posting threads and the engine both
//! touch: the queues of posted requests, the state. `Core` is the protocol, sans-IO, and belongs to one engine: a
//! `requester` that turns requests into packets and answers into completions, and a `responder` that does what the
//! peer asks.
//!
//! Lock order: engine, then send queue, then receive queue, then completion queue.

mod attributes;
mod core;
mod extended;
mod handle;
mod list;
mod near;
mod queue;
mod receive;
mod requester;
mod responder;
mod spec;
mod srq;
mod state;
mod transport;
mod work;

pub use attributes::{Attribute, ModifyQpError, QpAttributes, QpChange};
pub(super) use core::Core;
pub(super) use extended::SrqTable;
pub use handle::{QpAddress, QueuePair};
pub(super) use queue::Shared;
pub(super) use receive::{GRH_BYTES, RecvQueue};
pub use spec::{CreateQpError, QpSpec};
pub use srq::{CreateSrqError, SharedReceiveQueue, SrqLimitError, SrqSpec};
pub use state::{Demands, QpState, demands};
pub use transport::Transport;
pub(super) use work::{Context, Dma, Next};
