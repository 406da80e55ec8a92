//! The attributes of a queue pair: what software says when it changes its state, and reads back (IBTA volume 1, 11.2.5).

use super::state::{QpState, demands};
use super::{QpAddress, Transport};
use crate::hca::attributes::PKeyTable;
use crate::hca::config::{HcaConfig, PathMtu};
use crate::hca::key::Access;
use crate::hca::request::AddressVector;
use crate::hca::time::AckTimeout;
use crate::wire::{PKey, Psn, QKey, Qpn, RnrTimer};

bitflags::bitflags! {
    /// A set of attributes, in the bits of `enum ibv_qp_attr_mask`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Attribute: u32 {
        /// [`QpChange::state`].
        const STATE = 1;
        /// [`QpChange::current_state`].
        const CURRENT_STATE = 1 << 1;
        /// [`QpChange::notify_drained`].
        const NOTIFY_DRAINED = 1 << 2;
        /// [`QpChange::access`].
        const ACCESS = 1 << 3;
        /// [`QpChange::pkey_index`].
        const PKEY_INDEX = 1 << 4;
        /// [`QpChange::port`].
        const PORT = 1 << 5;
        /// [`QpChange::qkey`].
        const QKEY = 1 << 6;
        /// [`QpChange::path`].
        const PATH = 1 << 7;
        /// [`QpChange::path_mtu`].
        const PATH_MTU = 1 << 8;
        /// [`QpChange::timeout`].
        const TIMEOUT = 1 << 9;
        /// [`QpChange::retry_count`].
        const RETRY_COUNT = 1 << 10;
        /// [`QpChange::rnr_retry`].
        const RNR_RETRY = 1 << 11;
        /// [`QpChange::rq_psn`].
        const RQ_PSN = 1 << 12;
        /// [`QpChange::reads`].
        const READS = 1 << 13;
        /// [`QpChange::min_rnr_timer`].
        const MIN_RNR_TIMER = 1 << 15;
        /// [`QpChange::sq_psn`].
        const SQ_PSN = 1 << 16;
        /// [`QpChange::dest_reads`].
        const DEST_READS = 1 << 17;
        /// [`QpChange::dest_qpn`].
        const DEST_QPN = 1 << 20;
    }
}

macro_rules! change {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $attribute:ident),* $(,)?) => {
        /// A change of a queue pair: what is `Some` is told.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct QpChange {
            $($(#[$doc])* pub $name: Option<$type>,)*
        }

        impl QpChange {
            /// What it tells.
            #[must_use]
            pub fn told(&self) -> Attribute {
                let mut told = Attribute::empty();
                $(told.set(Attribute::$attribute, self.$name.is_some());)*
                told
            }
        }
    };
}

change! {
    /// The state to go to. `None` stays.
    state: QpState = STATE,
    /// What the caller takes the state to be; refused if it is another.
    current_state: QpState = CURRENT_STATE,
    /// On the way to [`QpState::SendQueueDrain`]: an asynchronous event says when it is drained.
    notify_drained: bool = NOTIFY_DRAINED,
    /// What the peer may do.
    access: Access = ACCESS,
    /// Which of the port's partition keys its packets carry.
    pkey_index: u16 = PKEY_INDEX,
    /// The port; the first is 1.
    port: u8 = PORT,
    /// UD: what a datagram must name to be received.
    qkey: QKey = QKEY,
    /// The way to the peer.
    path: AddressVector = PATH,
    /// Payload of a full packet.
    path_mtu: PathMtu = PATH_MTU,
    /// How long an acknowledgement is waited for.
    timeout: AckTimeout = TIMEOUT,
    /// How often it is asked again without an answer, 0 to 7.
    retry_count: u8 = RETRY_COUNT,
    /// How often it is asked again when the peer was not ready, 0 to 6; 7 is for ever.
    rnr_retry: u8 = RNR_RETRY,
    /// The first sequence number that the peer will send.
    rq_psn: Psn = RQ_PSN,
    /// Reads and atomics that it may have under way at its peer (`max_rd_atomic`).
    reads: u8 = READS,
    /// How long a peer is told to wait when this end is not ready.
    min_rnr_timer: RnrTimer = MIN_RNR_TIMER,
    /// The first sequence number that it sends.
    sq_psn: Psn = SQ_PSN,
    /// Reads and atomics that the peer may have under way here (`max_dest_rd_atomic`).
    dest_reads: u8 = DEST_READS,
    /// The queue pair at the other end.
    dest_qpn: Qpn = DEST_QPN,
}

/// The largest retry count that three bits hold (11.2.5.2).
const MAX_RETRIES: u8 = 7;

impl QpChange {
    /// To `state`, with nothing else.
    #[must_use]
    pub fn to(state: QpState) -> Self {
        Self { state: Some(state), ..Self::default() }
    }

    /// From reset to initialised, with what `transport` demands.
    #[must_use]
    pub fn init(transport: Transport, access: Access, qkey: QKey) -> Self {
        let datagram = transport == Transport::UnreliableDatagram;
        Self {
            pkey_index: Some(0),
            port: Some(1),
            access: (!datagram).then_some(access),
            qkey: datagram.then_some(qkey),
            ..Self::to(QpState::Init)
        }
    }

    /// From initialised to ready to receive from `peer`, with what `transport` demands and `config` says.
    #[must_use]
    pub fn ready_to_receive(transport: Transport, peer: QpAddress, config: &HcaConfig) -> Self {
        let told = demanded(transport, QpState::Init, QpState::ReadyToReceive);
        let has = |attribute| told.contains(attribute);
        Self {
            path: has(Attribute::PATH).then_some(AddressVector::to(peer.gid)),
            path_mtu: has(Attribute::PATH_MTU).then_some(config.path_mtu),
            dest_qpn: has(Attribute::DEST_QPN).then_some(peer.qpn),
            rq_psn: has(Attribute::RQ_PSN).then_some(peer.psn),
            dest_reads: has(Attribute::DEST_READS).then_some(config.most_reads()),
            min_rnr_timer: has(Attribute::MIN_RNR_TIMER).then_some(config.rnr_timer),
            ..Self::to(QpState::ReadyToReceive)
        }
    }

    /// From ready to receive to ready to send from `psn` on, with what `transport` demands and `config` says.
    #[must_use]
    pub fn ready_to_send(transport: Transport, psn: Psn, config: &HcaConfig) -> Self {
        let told = demanded(transport, QpState::ReadyToReceive, QpState::ReadyToSend);
        let has = |attribute| told.contains(attribute);
        Self {
            sq_psn: Some(psn),
            timeout: has(Attribute::TIMEOUT).then_some(config.ack_timeout),
            retry_count: has(Attribute::RETRY_COUNT).then_some(config.retry_count),
            rnr_retry: has(Attribute::RNR_RETRY).then_some(config.rnr_retry),
            reads: has(Attribute::READS).then_some(config.most_reads()),
            ..Self::to(QpState::ReadyToSend)
        }
    }
}

fn demanded(transport: Transport, from: QpState, to: QpState) -> Attribute {
    demands(transport, from, to).map_or(Attribute::empty(), |demands| demands.required)
}

/// What a queue pair is set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpAttributes {
    /// Its state.
    pub state: QpState,
    /// Of [`QpState::SendQueueDrain`]: something that was begun has not ended.
    pub draining: bool,
    /// See [`QpChange::access`].
    pub access: Access,
    /// See [`QpChange::pkey_index`].
    pub pkey_index: u16,
    /// The partition key of that index.
    pub pkey: PKey,
    /// See [`QpChange::port`].
    pub port: u8,
    /// See [`QpChange::qkey`].
    pub qkey: QKey,
    /// See [`QpChange::path`]. `None` until it was told.
    pub path: Option<AddressVector>,
    /// See [`QpChange::path_mtu`].
    pub path_mtu: PathMtu,
    /// See [`QpChange::timeout`].
    pub timeout: AckTimeout,
    /// See [`QpChange::retry_count`].
    pub retry_count: u8,
    /// See [`QpChange::rnr_retry`].
    pub rnr_retry: u8,
    /// The next sequence number that is expected of the peer.
    pub rq_psn: Psn,
    /// See [`QpChange::reads`].
    pub reads: u8,
    /// See [`QpChange::min_rnr_timer`].
    pub min_rnr_timer: RnrTimer,
    /// The next sequence number that it gives a request.
    pub sq_psn: Psn,
    /// See [`QpChange::dest_reads`].
    pub dest_reads: u8,
    /// See [`QpChange::dest_qpn`].
    pub dest_qpn: Qpn,
}

impl QpAttributes {
    /// What a new queue pair is set to.
    pub(super) fn new(access: Access, config: &HcaConfig) -> Self {
        Self {
            state: QpState::Reset,
            draining: false,
            access,
            pkey_index: 0,
            pkey: config.pkeys.get(0).unwrap_or_default(),
            port: 1,
            qkey: QKey::default(),
            path: None,
            path_mtu: config.path_mtu,
            timeout: config.ack_timeout,
            retry_count: config.retry_count,
            rnr_retry: config.rnr_retry,
            rq_psn: Psn::default(),
            reads: config.most_reads(),
            min_rnr_timer: config.rnr_timer,
            sq_psn: Psn::default(),
            dest_reads: config.most_reads(),
            dest_qpn: Qpn(0),
        }
    }

    /// Another partition key stands at its index now.
    pub(super) fn renew_pkey(&mut self, table: &PKeyTable) {
        self.pkey = table.get(self.pkey_index).unwrap_or_default();
    }

    /// What it is set to after `change`.
    pub(super) fn after(
        &self,
        change: &QpChange,
        transport: Transport,
        config: &HcaConfig,
    ) -> Result<Self, ModifyQpError> {
        let from = self.state;
        let to = change.state.unwrap_or(from);
        if change.current_state.is_some_and(|current| current != from) {
            return Err(ModifyQpError::OtherState { from });
        }
        let demands =
            demands(transport, from, to).ok_or(ModifyQpError::IllegalTransition { from, to, transport })?;
        let told = change.told() - Attribute::STATE;
        let missing = demands.required - told;
        if !missing.is_empty() {
            return Err(ModifyQpError::Missing { from, to, transport, missing });
        }
        let refused = told - demands.required - demands.optional;
        if !refused.is_empty() {
            return Err(ModifyQpError::NotAllowed { from, to, transport, refused });
        }
        check(change, config)?;
        let mut after = *self;
        after.state = to;
        macro_rules! take {
            ($($name:ident),*) => {$(if let Some(value) = change.$name { after.$name = value })*};
        }
        take!(access, pkey_index, port, qkey, path_mtu, timeout, retry_count, rnr_retry);
        take!(rq_psn, reads, min_rnr_timer, sq_psn, dest_reads, dest_qpn);
        after.path = change.path.or(after.path);
        after.pkey = config.pkeys.get(after.pkey_index).unwrap_or_default();
        Ok(after)
    }
}

fn check(change: &QpChange, config: &HcaConfig) -> Result<(), ModifyQpError> {
    let within = |attribute: Attribute, value: Option<u32>, min: u32, max: u32| match value {
        Some(value) if value < min || value > max => {
            Err(ModifyQpError::OutOfRange { attribute, value, min, max })
        }
        _ => Ok(()),
    };
    let retries = u32::from(config.retry_count.max(MAX_RETRIES));
    let reads = u32::from(config.most_reads());
    let pkeys = config.pkeys.keys().len() as u32;
    within(Attribute::PORT, change.port.map(u32::from), 1, 1)?;
    within(Attribute::PKEY_INDEX, change.pkey_index.map(u32::from), 0, pkeys - 1)?;
    within(Attribute::PATH_MTU, change.path_mtu.map(PathMtu::bytes), 0, config.path_mtu.bytes())?;
    within(Attribute::RETRY_COUNT, change.retry_count.map(u32::from), 0, retries)?;
    within(Attribute::RNR_RETRY, change.rnr_retry.map(u32::from), 0, u32::from(MAX_RETRIES))?;
    within(Attribute::READS, change.reads.map(u32::from), 0, reads)?;
    within(Attribute::DEST_READS, change.dest_reads.map(u32::from), 0, reads)?;
    within(Attribute::DEST_QPN, change.dest_qpn.map(|qpn| qpn.0), 0, 0xff_ffff)
}

/// Why a queue pair was not changed. It is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModifyQpError {
    /// There is no such way.
    #[error("a queue pair of {transport:?} does not go from {from:?} to {to:?}")]
    IllegalTransition {
        /// Its state.
        from: QpState,
        /// What was asked for.
        to: QpState,
        /// Its service.
        transport: Transport,
    },
    /// It is in another state than the caller takes it to be in.
    #[error("the queue pair is in state {from:?}")]
    OtherState {
        /// Its state.
        from: QpState,
    },
    /// The way needs what was not told.
    #[error("from {from:?} to {to:?} a queue pair of {transport:?} must be told {missing:?}")]
    Missing {
        /// Its state.
        from: QpState,
        /// What was asked for.
        to: QpState,
        /// Its service.
        transport: Transport,
        /// What is missing.
        missing: Attribute,
    },
    /// The way does not take what was told.
    #[error("from {from:?} to {to:?} a queue pair of {transport:?} cannot be told {refused:?}")]
    NotAllowed {
        /// Its state.
        from: QpState,
        /// What was asked for.
        to: QpState,
        /// Its service.
        transport: Transport,
        /// What is too much.
        refused: Attribute,
    },
    /// A value that the device cannot be set to.
    #[error("{attribute:?} is {value}, possible is {min} to {max}")]
    OutOfRange {
        /// Of what.
        attribute: Attribute,
        /// What was told.
        value: u32,
        /// The least possible.
        min: u32,
        /// The most possible.
        max: u32,
    },
    /// The device could not do it at the moment; only a fault plan says so.
    #[error("the device refused")]
    Refused,
    /// The device has failed; nothing of it is changed any more.
    #[error("the device has failed")]
    Failed,
    /// The queue pair is gone.
    #[error("the queue pair was destroyed")]
    Destroyed,
}
