//! Queue pairs and shared receive queues.

use super::request::Building;
use super::{Context, Cq, Pd, Xrcd};
use crate::abi::number::*;
use crate::abi::{IbvAhAttr, IbvGid, IbvGlobalRoute, IbvQpAttr, IbvQpCap};
use crate::errno::Errno;
use crate::handle::zeros;
use hw_model::hca::{
    AckTimeout, AddressVector, Attribute, Gid, GlobalRoute, PathMtu, Psn, QKey, QpAttributes, QpChange,
    QpSpec, QpState, Qpn, QueuePair, RnrTimer, SharedReceiveQueue, SrqSpec, Transport,
};
use hw_model::sync::Arc;
use std::ffi::c_int;

/// A queue pair.
pub(crate) struct Qp {
    pub(crate) context: Arc<Context>,
    pub(crate) qp: Arc<QueuePair>,
    pub(crate) building: Building,
    /// For their counts of users.
    _holds: Holds,
}

/// What a queue pair keeps from being destroyed.
enum Holds {
    Queues { _pd: Arc<Pd>, _send: Arc<Cq>, _recv: Arc<Cq>, _srq: Option<Arc<Srq>> },
    Domain { _xrcd: Arc<Xrcd> },
}

/// A shared receive queue.
pub(crate) struct Srq {
    pub(crate) queue: Arc<SharedReceiveQueue>,
    pub(crate) context: Arc<Context>,
    _pd: Arc<Pd>,
    /// Of one that is reached over extended connections.
    _extended: Option<(Arc<Xrcd>, Arc<Cq>)>,
}

/// What a program asks of a new queue pair.
pub(crate) struct QpWanted {
    pub(crate) kind: c_int,
    pub(crate) cap: IbvQpCap,
    pub(crate) signal_all: bool,
    pub(crate) send_cq: Arc<Cq>,
    pub(crate) recv_cq: Arc<Cq>,
    pub(crate) srq: Option<Arc<Srq>>,
}

impl Qp {
    pub(crate) fn new(pd: &Arc<Pd>, wanted: QpWanted) -> Result<Arc<Self>, Errno> {
        let cap = wanted.cap;
        let spec = QpSpec {
            transport: transport(wanted.kind)?,
            srq: wanted.srq.as_ref().map(|srq| Arc::clone(&srq.queue)),
            recv_cq: Arc::clone(&wanted.recv_cq.queue),
            access: hw_model::hca::Access::empty(),
            // A queue of nothing is legal in verbs; ours holds one at least.
            max_send_requests: cap.max_send_wr.max(1),
            max_sges: cap.max_send_sge,
            // An atomic write takes its word with it, whatever was asked for.
            max_inline: cap.max_inline_data.max(WORD),
            max_recv_requests: cap.max_recv_wr,
            max_recv_sges: cap.max_recv_sge,
            signal_all: wanted.signal_all,
            ..QpSpec::new(pd.domain.handle(), &wanted.send_cq.queue)
        };
        let qp = pd.context.device.hca().create_qp(&spec)?;
        let (_send, _recv, _srq) = (wanted.send_cq, wanted.recv_cq, wanted.srq);
        let holds = Holds::Queues { _pd: Arc::clone(pd), _send, _recv, _srq };
        Ok(Self::over(Arc::clone(&pd.context), qp, holds))
    }

    fn over(context: Arc<Context>, qp: Arc<QueuePair>, holds: Holds) -> Arc<Self> {
        Arc::new(Self { context, qp, building: Building::default(), _holds: holds })
    }

    /// A target of extended connections.
    pub(crate) fn target(xrcd: &Arc<Xrcd>) -> Result<Arc<Self>, Errno> {
        let spec = QpSpec { access: hw_model::hca::Access::empty(), ..QpSpec::target(&xrcd.domain) };
        let qp = xrcd.context.device.hca().create_qp(&spec)?;
        Ok(Self::over(Arc::clone(&xrcd.context), qp, Holds::Domain { _xrcd: Arc::clone(xrcd) }))
    }

    /// One that is there, once more.
    pub(crate) fn open(xrcd: &Arc<Xrcd>, number: Qpn) -> Result<Arc<Self>, Errno> {
        let qp = xrcd.domain.open_qp(number)?;
        Ok(Self::over(Arc::clone(&xrcd.context), qp, Holds::Domain { _xrcd: Arc::clone(xrcd) }))
    }

    /// Changes what `mask` says of `attr`.
    pub(crate) fn modify(&self, attr: &IbvQpAttr, mask: c_int) -> Result<(), Errno> {
        let change = change(attr, mask)?;
        if let Some(path) = &change.path {
            // A way that begins at an address that the port does not have leads nowhere.
            self.qp.hca().query_gid(PORT, path.source_gid_index.into()).map_err(|_| Errno::INVAL)?;
        }
        self.qp.modify(&change)?;
        if change.state == Some(QpState::Reset) {
            // A queue pair that begins anew leaves nothing of before, as with libmlx4 and libmlx5.
            let spec = self.qp.spec();
            [&spec.send_cq, &spec.recv_cq].into_iter().for_each(|cq| cq.forget(self.qp.qpn()));
        }
        Ok(())
    }

    /// What it is set to.
    pub(crate) fn attributes(&self) -> Result<IbvQpAttr, Errno> {
        let attributes = self.qp.query()?;
        let cap = self.capacity();
        Ok(IbvQpAttr { cap, ..described(&attributes) })
    }

    /// How much it holds.
    pub(crate) fn capacity(&self) -> IbvQpCap {
        let spec = self.qp.spec();
        if spec.transport == Transport::ExtendedTarget {
            return zeros();
        }
        let shared = spec.srq.is_some() || spec.transport == Transport::ExtendedInitiator;
        IbvQpCap {
            max_send_wr: spec.max_send_requests,
            max_recv_wr: if shared { 0 } else { spec.max_recv_requests },
            max_send_sge: spec.max_sges,
            max_recv_sge: if shared { 0 } else { spec.max_recv_sges },
            max_inline_data: spec.max_inline,
        }
    }
}

impl Srq {
    pub(crate) fn new(pd: &Arc<Pd>, max_requests: u32, max_sges: u32) -> Result<Arc<Self>, Errno> {
        let spec = SrqSpec { pd: pd.domain.handle(), max_requests, max_sges };
        let queue = pd.context.device.hca().create_srq(&spec)?;
        Ok(Arc::new(Self { queue, context: Arc::clone(&pd.context), _pd: Arc::clone(pd), _extended: None }))
    }

    /// One of `xrcd`, whose receives complete to `cq`.
    pub(crate) fn extended(
        pd: &Arc<Pd>,
        (xrcd, cq): (&Arc<Xrcd>, &Arc<Cq>),
        (max_requests, max_sges): (u32, u32),
    ) -> Result<Arc<Self>, Errno> {
        let spec = SrqSpec { pd: pd.domain.handle(), max_requests, max_sges };
        let queue = pd.context.device.hca().create_extended_srq(&spec, &xrcd.domain, &cq.queue)?;
        let extended = Some((Arc::clone(xrcd), Arc::clone(cq)));
        Ok(Arc::new(Self {
            queue,
            context: Arc::clone(&pd.context),
            _pd: Arc::clone(pd),
            _extended: extended,
        }))
    }
}

fn transport(kind: c_int) -> Result<Transport, Errno> {
    match kind {
        IBV_QPT_RC => Ok(Transport::ReliableConnection),
        IBV_QPT_UC => Ok(Transport::UnreliableConnection),
        IBV_QPT_UD => Ok(Transport::UnreliableDatagram),
        IBV_QPT_XRC_SEND => Ok(Transport::ExtendedInitiator),
        IBV_QPT_RAW_PACKET | IBV_QPT_DRIVER => Err(Errno::NOTSUPP),
        // One that receives is made in its domain, by other calls.
        _ => Err(Errno::INVAL),
    }
}

const STATES: [QpState; 7] = [
    QpState::Reset,
    QpState::Init,
    QpState::ReadyToReceive,
    QpState::ReadyToSend,
    QpState::SendQueueDrain,
    QpState::SendQueueError,
    QpState::Error,
];

fn state(number: c_int) -> Result<QpState, Errno> {
    usize::try_from(number).ok().and_then(|at| STATES.get(at)).copied().ok_or(Errno::INVAL)
}

/// `enum ibv_qp_state`.
pub(crate) fn state_number(state: QpState) -> c_int {
    STATES.iter().zip(0..).find(|(known, _)| **known == state).map_or(-1, |(_, number)| number)
}

/// Packets of `enum ibv_mtu`.
fn mtu(number: c_int) -> Result<PathMtu, Errno> {
    if !(IBV_MTU_256..=IBV_MTU_4096).contains(&number) {
        return Err(Errno::INVAL);
    }
    PathMtu::new(128 << number).ok_or(Errno::INVAL)
}

/// `enum ibv_mtu`, which ends at 4096.
pub(crate) fn mtu_number(mtu: PathMtu) -> c_int {
    (mtu.bytes() >> 8).trailing_zeros().cast_signed().saturating_add(1).min(IBV_MTU_4096)
}

/// The way of an `ibv_ah_attr`. RoCE has no other than by GID.
pub(crate) fn vector(attr: &IbvAhAttr) -> Result<AddressVector, Errno> {
    if attr.is_global == 0 || attr.port_num != PORT {
        return Err(Errno::INVAL);
    }
    let grh = &attr.grh;
    let route = GlobalRoute {
        flow_label: grh.flow_label & 0xf_ffff,
        traffic_class: grh.traffic_class,
        // 0 in a program that does not care would be a packet that goes nowhere.
        hop_limit: if grh.hop_limit == 0 { GlobalRoute::DEFAULT.hop_limit } else { grh.hop_limit },
    };
    Ok(AddressVector {
        gid: Gid(u128::from_be_bytes(grh.dgid.raw)),
        source_gid_index: grh.sgid_index,
        route,
        service_level: attr.sl & 0xf,
    })
}

/// The `ibv_ah_attr` of a way.
pub(crate) fn described_way(vector: &AddressVector) -> IbvAhAttr {
    IbvAhAttr {
        grh: IbvGlobalRoute {
            dgid: IbvGid { raw: vector.gid.0.to_be_bytes() },
            flow_label: vector.route.flow_label,
            sgid_index: vector.source_gid_index,
            hop_limit: vector.route.hop_limit,
            traffic_class: vector.route.traffic_class,
        },
        sl: vector.service_level,
        is_global: 1,
        port_num: PORT,
        ..zeros()
    }
}

/// Bytes of an atomic write.
const WORD: u32 = 8;
/// The shortest wait for an acknowledgement, 0.54 s: the peer is a process of a machine that may be busy with others.
const LEAST_TIMEOUT: u8 = 17;
/// The only port.
const PORT: u8 = 1;

/// What `mask` tells of `attr`. The model's bits are those of `enum ibv_qp_attr_mask`; what it has no bit for, it cannot do.
fn change(attr: &IbvQpAttr, mask: c_int) -> Result<QpChange, Errno> {
    let told = Attribute::from_bits(mask.cast_unsigned()).ok_or(Errno::NOTSUPP)?;
    fn when<T>(
        told: Attribute,
        bit: Attribute,
        value: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<Option<T>, Errno> {
        told.contains(bit).then(value).transpose()
    }
    let access = || super::memory::rights(attr.qp_access_flags);
    // 0 waits for ever. A device may wait longer than it is told (9.7.6.1.3).
    let timeout = || match attr.timeout {
        0 => AckTimeout::from_code(0).ok_or(Errno::INVAL),
        code => AckTimeout::from_code(code)
            .map(|_| code.max(LEAST_TIMEOUT))
            .and_then(AckTimeout::from_code)
            .ok_or(Errno::INVAL),
    };
    let rnr_timer = || RnrTimer::from_code(attr.min_rnr_timer).ok_or(Errno::INVAL);
    Ok(QpChange {
        state: when(told, Attribute::STATE, || state(attr.qp_state))?,
        current_state: when(told, Attribute::CURRENT_STATE, || state(attr.cur_qp_state))?,
        notify_drained: when(told, Attribute::NOTIFY_DRAINED, || Ok(attr.en_sqd_async_notify != 0))?,
        access: when(told, Attribute::ACCESS, access)?,
        pkey_index: when(told, Attribute::PKEY_INDEX, || Ok(attr.pkey_index))?,
        port: when(told, Attribute::PORT, || Ok(attr.port_num))?,
        qkey: when(told, Attribute::QKEY, || Ok(QKey(attr.qkey)))?,
        path: when(told, Attribute::PATH, || vector(&attr.ah_attr))?,
        path_mtu: when(told, Attribute::PATH_MTU, || mtu(attr.path_mtu))?,
        timeout: when(told, Attribute::TIMEOUT, timeout)?,
        retry_count: when(told, Attribute::RETRY_COUNT, || Ok(attr.retry_cnt))?,
        rnr_retry: when(told, Attribute::RNR_RETRY, || Ok(attr.rnr_retry))?,
        rq_psn: when(told, Attribute::RQ_PSN, || Ok(Psn::new(attr.rq_psn)))?,
        reads: when(told, Attribute::READS, || Ok(attr.max_rd_atomic))?,
        min_rnr_timer: when(told, Attribute::MIN_RNR_TIMER, rnr_timer)?,
        sq_psn: when(told, Attribute::SQ_PSN, || Ok(Psn::new(attr.sq_psn)))?,
        dest_reads: when(told, Attribute::DEST_READS, || Ok(attr.max_dest_rd_atomic))?,
        dest_qpn: when(told, Attribute::DEST_QPN, || Ok(Qpn(attr.dest_qp_num)))?,
    })
}

fn described(attributes: &QpAttributes) -> IbvQpAttr {
    IbvQpAttr {
        qp_state: state_number(attributes.state),
        cur_qp_state: state_number(attributes.state),
        path_mtu: mtu_number(attributes.path_mtu),
        qkey: attributes.qkey.0,
        rq_psn: attributes.rq_psn.get(),
        sq_psn: attributes.sq_psn.get(),
        dest_qp_num: attributes.dest_qpn.0,
        qp_access_flags: attributes.access.bits() & 0xf,
        ah_attr: attributes.path.as_ref().map_or_else(zeros, described_way),
        pkey_index: attributes.pkey_index,
        sq_draining: attributes.draining.into(),
        max_rd_atomic: attributes.reads,
        max_dest_rd_atomic: attributes.dest_reads,
        min_rnr_timer: attributes.min_rnr_timer.code(),
        port_num: attributes.port,
        timeout: attributes.timeout.code(),
        retry_cnt: attributes.retry_count,
        rnr_retry: attributes.rnr_retry,
        ..zeros()
    }
}
