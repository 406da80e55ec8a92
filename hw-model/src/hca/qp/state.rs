//! The states of a queue pair and the one function that says which follows which (IBTA volume 1, 10.3.1, figure 124).

use super::QpAddress;

/// The state of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QpState {
    /// New: no requests are taken, nothing is sent or received.
    Reset,
    /// Has its protection domain and rights.
    Init,
    /// Answers its peer; does not send requests.
    ReadyToReceive,
    /// Sends and answers.
    ReadyToSend,
    /// Something failed. Requests are taken and flushed at once; packets are dropped.
    Error,
}

impl QpState {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Reset, Self::Init, Self::ReadyToReceive, Self::ReadyToSend, Self::Error];

    /// Whether the queue pair answers requests of its peer.
    #[must_use]
    pub fn receives(self) -> bool {
        matches!(self, Self::ReadyToReceive | Self::ReadyToSend)
    }

    /// Whether requests can be posted to its send queue (10.8.2: in the error state they are flushed).
    #[must_use]
    pub fn takes_requests(self) -> bool {
        matches!(self, Self::ReadyToSend | Self::Error)
    }

    /// The state that `transition` leads to.
    ///
    /// # Errors
    /// [`IllegalTransition`].
    pub fn after(self, transition: &Transition) -> Result<Self, IllegalTransition> {
        match (self, transition) {
            (_, Transition::Reset) => Ok(Self::Reset),
            (_, Transition::Error) => Ok(Self::Error),
            (Self::Reset | Self::Init, Transition::Init) => Ok(Self::Init),
            (Self::Init, Transition::ReadyToReceive { .. }) => Ok(Self::ReadyToReceive),
            (Self::ReadyToReceive | Self::ReadyToSend, Transition::ReadyToSend) => Ok(Self::ReadyToSend),
            _ => Err(IllegalTransition { from: self, transition: *transition }),
        }
    }
}

/// A change of state with what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transition {
    /// Forget everything; what was posted ends with a flush error.
    Reset,
    /// Prepare.
    Init,
    /// Know the peer.
    ReadyToReceive {
        /// The queue pair at the other end, with the first sequence number it will send.
        peer: QpAddress,
    },
    /// Begin to send, from the sequence number in [`QueuePair::address`](super::QueuePair::address).
    ReadyToSend,
    /// Stop; what was posted ends with a flush error.
    Error,
}

/// This state cannot be followed by that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a queue pair in state {from:?} cannot take {transition:?}")]
pub struct IllegalTransition {
    /// Its state.
    pub from: QpState,
    /// What was asked for.
    pub transition: Transition,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Gid, Psn, Qpn};

    #[test]
    fn exactly_the_transitions_of_the_specification_are_legal() {
        let peer = QpAddress { gid: Gid(1), qpn: Qpn(2), psn: Psn::new(3) };
        let receive = Transition::ReadyToReceive { peer };
        let all = [Transition::Reset, Transition::Init, receive, Transition::ReadyToSend, Transition::Error];
        let legal = |from: QpState| -> Vec<QpState> {
            all.iter().filter_map(|transition| from.after(transition).ok()).collect()
        };
        use QpState::{Error, Init, ReadyToReceive, ReadyToSend, Reset};
        assert_eq!(legal(Reset), [Reset, Init, Error]);
        assert_eq!(legal(Init), [Reset, Init, ReadyToReceive, Error]);
        assert_eq!(legal(ReadyToReceive), [Reset, ReadyToSend, Error]);
        assert_eq!(legal(ReadyToSend), [Reset, ReadyToSend, Error]);
        assert_eq!(legal(Error), [Reset, Error]);
    }
}
