//! What a queue pair does beside sending: its terms, receives, its state.

use crate::rig::{Devices, End, Queue, Rig};
use crate::world::Error;
use hw_model::hca::{Access, AckTimeout, QKey, QpChange, QpState, RecvRequest, Transport};
#[cfg(feature = "verbs")]
use mr::device::verbs::Terms;

/// On which terms a connection is.
#[derive(Clone, Copy)]
pub struct Tries {
    /// What the peer may do.
    pub access: Access,
    /// How long an answer is waited for, as the specification codes it.
    pub timeout: u8,
    /// How often it is asked again without an answer.
    pub retries: u8,
    /// How often it is asked again when the peer was not ready; 7 is for ever.
    pub rnr_retries: u8,
}

impl Default for Tries {
    /// Long enough for an emulated machine, which may be slow but must not give up.
    fn default() -> Self {
        let access = Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC;
        Self { access, timeout: 18, retries: 7, rnr_retries: 7 }
    }
}

impl Rig {
    /// Connects one end to another.
    pub fn connect(&self, end: End, from: &Queue, to: &Queue, tries: Tries) -> Result<(), Error> {
        match (&self.devices, from, to) {
            (Devices::Model(machine), Queue::Model(one, _), Queue::Model(other, _)) => {
                let device = if end == End::Responder { &machine.near } else { &machine.far };
                let (service, config) = (Transport::ReliableConnection, device.hca().config());
                one.modify(&QpChange::init(service, tries.access, QKey::default()))?;
                one.modify(&QpChange::ready_to_receive(service, other.endpoint(), config))?;
                one.modify(&QpChange {
                    timeout: AckTimeout::from_code(tries.timeout),
                    retry_count: Some(tries.retries),
                    rnr_retry: Some(tries.rnr_retries),
                    ..QpChange::ready_to_send(service, one.endpoint().psn, config)
                })?;
            }
            #[cfg(feature = "verbs")]
            (_, Queue::Verbs(one, _), Queue::Verbs(other, _)) => {
                let Tries { access, timeout, retries, rnr_retries } = tries;
                let access = access | Access::LOCAL_WRITE;
                one.connect_with(other.endpoint(), Terms { access, timeout, retries, rnr_retries })?;
            }
            #[cfg(feature = "verbs")]
            _ => return Err("queue pairs of two devices".into()),
        }
        Ok(())
    }
}

impl Queue {
    pub fn post_recv(&self, request: &RecvRequest<'_>) -> Result<(), Error> {
        match self {
            Self::Model(qp, _) => qp.post_recv(request)?,
            #[cfg(feature = "verbs")]
            Self::Verbs(qp, _) => qp.post_recv(request)?,
        }
        Ok(())
    }

    /// To the error state: what is posted is flushed.
    pub fn fail(&self) -> Result<(), Error> {
        match self {
            Self::Model(qp, _) => qp.modify(&QpChange::to(QpState::Error))?,
            #[cfg(feature = "verbs")]
            Self::Verbs(qp, _) => qp.fail()?,
        }
        Ok(())
    }

    pub fn state(&self) -> Result<QpState, Error> {
        Ok(match self {
            Self::Model(qp, _) => qp.query()?.state,
            #[cfg(feature = "verbs")]
            Self::Verbs(qp, _) => qp.state()?,
        })
    }
}
