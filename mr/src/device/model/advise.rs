//! The verb that takes advice about pieces of regions (ibv_advise_mr(3); drivers/infiniband/hw/mlx5/odp.c
//! `mlx5_ib_advise_mr_prefetch`).

use super::ModelPd;
use super::prefetch::Origin;
use super::target::FaultTarget;
use crate::device::{AdviseError, Flush};
use hw_model::addr::VirtRange;
use hw_model::hca::Sge;
use odp::fault::Want;
use odp::space::Access;

pub(super) fn advise(pd: &ModelPd, want: Want, flush: Flush, pieces: &[Sge]) -> Result<(), AdviseError> {
    if pieces.is_empty() {
        return Err(AdviseError::Nothing);
    }
    let checked: Vec<_> = pieces.iter().map(|piece| check(pd, want, piece)).collect::<Result<_, _>>()?;
    for (target, memory) in checked {
        match flush {
            Flush::Yes => target.bring(memory, want)?,
            Flush::No => drop(pd.device().prefetcher().ask(&target, memory, want, Origin::Advice)),
        }
    }
    Ok(())
}

/// The memory of one piece, if advice about it can be taken.
fn check(pd: &ModelPd, want: Want, piece: &Sge) -> Result<(FaultTarget, VirtRange), AdviseError> {
    let (key, device) = (piece.key, pd.device());
    let target = device.fault_target(key).ok_or_else(|| match device.hca().has_key(key) {
        true => AdviseError::NotARegion { key },
        false => AdviseError::UnknownKey { key },
    })?;
    if target.pd != pd.handle() {
        return Err(AdviseError::OtherPd { key });
    }
    if !target.is_on_demand() {
        return Err(AdviseError::NotOnDemand { key });
    }
    if want == Want::Fault(Access::Write) && !target.is_writable() {
        return Err(AdviseError::NotWritable);
    }
    let len = u64::from(piece.length);
    let memory = target.memory_of(piece.address, len).ok_or(AdviseError::OutOfRange {
        offset: piece.address.0.wrapping_sub(target.address.0),
        len,
        region: target.range.len(),
    })?;
    Ok((target, memory))
}
