//! Requests over an extended connection: each names the shared receive queue that it is for, and reaches the memory of this
//! queue's protection domain (IBTA volume 1, annex A14).

use super::Responder;
use crate::hca::key::Caller;
use crate::hca::pd::Pd;
use crate::hca::qp::Transport;
use crate::hca::qp::queue::{Receiving, Shared};
use crate::hca::qp::work::Context;
use crate::wire::{NakCode, Packet, Service};

impl Responder {
    /// The protection domain that a request is carried out in: the queue pair's, or that of the queue it names. One that
    /// begins (`is_new`) is remembered, for what comes after. A queue that is not there, is not an extended one or is in
    /// another domain, and one that changes in the middle of a message, make the request invalid.
    pub(super) fn aim(
        &mut self,
        packet: &Packet,
        is_new: bool,
        shared: &Shared,
        context: &Context<'_>,
    ) -> Result<Pd, NakCode> {
        if shared.transport != Transport::ExtendedTarget {
            return Ok(shared.pd);
        }
        let Service::ExtendedConnection(Some(number)) = packet.service else {
            return Err(NakCode::InvalidRequest);
        };
        // The domain is known by its own protection domain, which its targets have.
        let found = context.device.srqs.find(number, shared.pd).ok_or(NakCode::InvalidRequest)?;
        let pd = found.pd;
        if is_new {
            let under_way = self.message.is_some() || self.receive.is_some();
            let other = self.target.as_ref().is_some_and(|target| target.number != number);
            if under_way && other {
                return Err(NakCode::InvalidRequest);
            }
            self.target = Some(found);
        }
        Ok(pd)
    }

    /// Where receives come from and complete to.
    pub(super) fn receiving<'a>(&'a self, shared: &'a Shared) -> &'a Receiving {
        self.target.as_ref().map_or(&shared.receives, |target| &target.receiving)
    }

    /// The protection domain of the request that is being carried out.
    pub(super) fn pd(&self, shared: &Shared) -> Pd {
        self.target.as_ref().map_or(shared.pd, |target| target.pd)
    }

    /// Who carries it out, as the keys know it.
    pub(super) fn caller(&self, shared: &Shared) -> Caller {
        Caller { pd: self.pd(shared), qpn: shared.qpn }
    }

    /// The service of the request that is being carried out.
    pub(super) fn service(&self) -> Service {
        match &self.target {
            Some(target) => Service::ExtendedConnection(Some(target.number)),
            None => Service::ReliableConnection,
        }
    }
}
