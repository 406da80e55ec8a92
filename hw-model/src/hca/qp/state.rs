//! The states of a queue pair and the one table that says which follows which, with what (IBTA volume 1, 10.3.1, figure
//! 124, and 11.2.5.2, table 95).

use super::Transport;
use super::attributes::Attribute;

/// The state of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QpState {
    /// New: no requests are taken, nothing is sent or received.
    Reset,
    /// Has its port and rights. Receives can be posted.
    Init,
    /// Answers its peer; does not send requests.
    ReadyToReceive,
    /// Sends and answers.
    ReadyToSend,
    /// Answers. Ends what it has begun to send, and begins nothing; requests are taken and wait.
    SendQueueDrain,
    /// A send request of an unreliable service failed: what was posted after it was flushed, and so is what is posted now.
    /// It receives as before.
    SendQueueError,
    /// Something failed. Requests are taken and flushed at once; packets are dropped.
    Error,
}

impl QpState {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::Reset,
        Self::Init,
        Self::ReadyToReceive,
        Self::ReadyToSend,
        Self::SendQueueDrain,
        Self::SendQueueError,
        Self::Error,
    ];

    /// Whether the queue pair answers requests of its peer.
    #[must_use]
    pub const fn receives(self) -> bool {
        !matches!(self, Self::Reset | Self::Init | Self::Error)
    }

    /// Whether its requester works: begins requests, or ends those that it has begun.
    #[must_use]
    pub const fn sends(self) -> bool {
        matches!(self, Self::ReadyToSend | Self::SendQueueDrain)
    }

    /// Whether requests can be posted to its send queue (10.8.2: in the error states they are flushed).
    #[must_use]
    pub const fn takes_requests(self) -> bool {
        !matches!(self, Self::Reset | Self::Init | Self::ReadyToReceive)
    }

    /// Whether requests can be posted to its receive queue (10.8.2).
    #[must_use]
    pub const fn takes_receives(self) -> bool {
        !matches!(self, Self::Reset)
    }
}

/// A way from one state to the next, for some services: a row of the table.
struct Row {
    from: QpState,
    to: QpState,
    of: &'static [Transport],
    required: Attribute,
    optional: Attribute,
}

use Transport::{
    ExtendedInitiator as XI, ExtendedTarget as XT, ReliableConnection as RC, UnreliableConnection as UC,
    UnreliableDatagram as UD,
};

const ALL: &[Transport] = &[RC, UC, UD, XI, XT];
const CONNECTED: &[Transport] = &[RC, UC, XI, XT];

const NOTHING: Attribute = Attribute::empty();
const OPEN: Attribute = Attribute::PKEY_INDEX.union(Attribute::PORT).union(Attribute::ACCESS);
const OPEN_UD: Attribute = Attribute::PKEY_INDEX.union(Attribute::PORT).union(Attribute::QKEY);
const PEER: Attribute =
    Attribute::PATH.union(Attribute::PATH_MTU).union(Attribute::DEST_QPN).union(Attribute::RQ_PSN);
const PEER_RELIABLE: Attribute = PEER.union(Attribute::DEST_READS).union(Attribute::MIN_RNR_TIMER);
const SEND_RELIABLE: Attribute = Attribute::TIMEOUT
    .union(Attribute::RETRY_COUNT)
    .union(Attribute::RNR_RETRY)
    .union(Attribute::SQ_PSN)
    .union(Attribute::READS);
const SEND_TARGET: Attribute = Attribute::TIMEOUT.union(Attribute::SQ_PSN);
const LATER: Attribute = Attribute::CURRENT_STATE.union(Attribute::ACCESS);
const LATER_RELIABLE: Attribute = LATER.union(Attribute::MIN_RNR_TIMER);
const LATER_UD: Attribute = Attribute::CURRENT_STATE.union(Attribute::QKEY);
const DRAINED_UC: Attribute = Attribute::PATH.union(Attribute::ACCESS).union(Attribute::PKEY_INDEX);
const DRAINED_RC: Attribute = DRAINED_UC
    .union(Attribute::PORT)
    .union(Attribute::TIMEOUT)
    .union(Attribute::RETRY_COUNT)
    .union(Attribute::RNR_RETRY)
    .union(Attribute::READS)
    .union(Attribute::DEST_READS)
    .union(Attribute::MIN_RNR_TIMER);

const fn row(
    (from, to): (QpState, QpState),
    of: &'static [Transport],
    required: Attribute,
    optional: Attribute,
) -> Row {
    Row { from, to, of, required, optional }
}

/// Every way but those to [`QpState::Reset`] and [`QpState::Error`], which lead there from everywhere and take nothing.
const TABLE: &[Row] = {
    use QpState::{
        Init, ReadyToReceive as Rtr, ReadyToSend as Rts, Reset, SendQueueDrain as Sqd, SendQueueError as Sqe,
    };
    &[
        row((Reset, Init), CONNECTED, OPEN, NOTHING),
        row((Reset, Init), &[UD], OPEN_UD, NOTHING),
        row((Init, Init), CONNECTED, NOTHING, OPEN),
        row((Init, Init), &[UD], NOTHING, OPEN_UD),
        row((Init, Rtr), &[RC, XT], PEER_RELIABLE, Attribute::ACCESS.union(Attribute::PKEY_INDEX)),
        row((Init, Rtr), &[UC, XI], PEER, Attribute::ACCESS.union(Attribute::PKEY_INDEX)),
        row((Init, Rtr), &[UD], NOTHING, Attribute::PKEY_INDEX.union(Attribute::QKEY)),
        row((Rtr, Rts), &[RC], SEND_RELIABLE, LATER_RELIABLE),
        row((Rtr, Rts), &[XI], SEND_RELIABLE, LATER),
        row((Rtr, Rts), &[XT], SEND_TARGET, LATER_RELIABLE),
        row((Rtr, Rts), &[UC], Attribute::SQ_PSN, LATER),
        row((Rtr, Rts), &[UD], Attribute::SQ_PSN, LATER_UD),
        row((Rts, Rts), &[RC, XT], NOTHING, LATER_RELIABLE),
        row((Rts, Rts), &[UC, XI], NOTHING, LATER),
        row((Rts, Rts), &[UD], NOTHING, LATER_UD),
        row((Rts, Sqd), ALL, NOTHING, Attribute::NOTIFY_DRAINED),
        row((Sqd, Rts), &[RC, XT], NOTHING, LATER_RELIABLE),
        row((Sqd, Rts), &[UC, XI], NOTHING, LATER),
        row((Sqd, Rts), &[UD], NOTHING, LATER_UD),
        row((Sqd, Sqd), &[RC, XI, XT], NOTHING, DRAINED_RC),
        row((Sqd, Sqd), &[UC], NOTHING, DRAINED_UC),
        row((Sqd, Sqd), &[UD], NOTHING, Attribute::PKEY_INDEX.union(Attribute::QKEY)),
        row((Sqe, Rts), &[UC], NOTHING, LATER),
        row((Sqe, Rts), &[UD], NOTHING, LATER_UD),
    ]
};

/// What a change from one state to another must say, and what it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demands {
    /// Must be there.
    pub required: Attribute,
    /// May be there.
    pub optional: Attribute,
}

/// What a queue pair of `transport` must and may be told on its way from `from` to `to`; `None` if there is no such way.
#[must_use]
pub fn demands(transport: Transport, from: QpState, to: QpState) -> Option<Demands> {
    if matches!(to, QpState::Reset | QpState::Error) {
        return Some(Demands { required: NOTHING, optional: NOTHING });
    }
    let fits = |row: &&Row| row.from == from && row.to == to && row.of.contains(&transport);
    let row = TABLE.iter().find(fits)?;
    Some(Demands { required: row.required, optional: row.optional })
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
