//! Events that software waits for by a file descriptor: completion channels, and the asynchronous events of the device
//! (IBTA volume 1, 11.4.2.3 and 11.6.3).
//!
//! A program polls the descriptor beside its sockets, and takes events when it is readable. The descriptor is readable
//! exactly while the queue behind it is not empty: it is written when the first event comes in and read when the last goes
//! out, both under the queue's lock, by nobody else. So whoever takes an event never blocks on the descriptor itself, and an
//! event that is taken back (its object is destroyed) leaves nothing readable behind.
//!
//! Lock order: completion queue, event queue. Nothing is called under an event queue's lock.

mod asynchronous;
mod channel;
mod queue;

pub use asynchronous::{AsyncEvent, AsyncEvents};
pub(super) use channel::{Channel, Unacknowledged};
pub use channel::{CompletionChannel, CompletionEvent, CreateChannelError};
