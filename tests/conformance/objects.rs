//! Completion channels, shared receive queues, asynchronous events, and the queues that have them.

use crate::rig::{Devices, End, Pd, Queue, Rig};
use crate::world::Error;
use hw_model::hca::{AsyncEvent, Moderation, Notify, RecvRequest, Transport};
use hw_model::sync::{Arc, Mutex};
use hw_model::wire::{Qpn, Srqn};
use mr::Device;
#[cfg(feature = "verbs")]
use mr::device::verbs::{VerbsChannel, VerbsQpOptions, VerbsSrq};
use mr::device::{CompletionChannel, CqOptions, QpOptions, SharedReceiveQueue};
use std::time::{Duration, Instant};

/// What has not come by then does not come.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub enum Channel {
    Model(Arc<dyn CompletionChannel>),
    #[cfg(feature = "verbs")]
    Verbs(Arc<VerbsChannel>),
}

/// A shared receive queue.
pub enum Shared {
    Model(Arc<dyn SharedReceiveQueue>),
    #[cfg(feature = "verbs")]
    Verbs(Arc<VerbsSrq>),
}

/// What a queue pair and its completion queue are made with.
#[derive(Clone, Copy)]
pub struct Wants<'a> {
    pub entries: u32,
    /// Where events of the completion queue go, and what it is called in them.
    pub channel: Option<(&'a Channel, u64)>,
    pub shared: Option<&'a Shared>,
}

impl Wants<'_> {
    pub const NOTHING: Self = Self { entries: 64, channel: None, shared: None };
}

impl Rig {
    pub fn channel(&self, end: End) -> Result<Channel, Error> {
        Ok(match &self.devices {
            Devices::Model(machine) => {
                let device = if end == End::Responder { &machine.near } else { &machine.far };
                Channel::Model(Arc::clone(device).create_channel()?)
            }
            #[cfg(feature = "verbs")]
            Devices::Verbs(device) => Channel::Verbs(device.create_channel()?),
        })
    }

    /// A queue pair, not connected.
    pub fn queue_with(&self, end: End, pd: &Pd, wants: Wants<'_>) -> Result<Queue, Error> {
        Ok(match (&self.devices, pd) {
            (Devices::Model(machine), Pd::Model(pd)) => {
                let device = if end == End::Responder { &machine.near } else { &machine.far };
                let channel = wants.channel.map(|(channel, cookie)| (channel.model(), cookie));
                let (channel, cookie) =
                    channel.map_or((None, 0), |(channel, cookie)| (Some(channel), cookie));
                let options = CqOptions { entries: wants.entries, channel, cookie };
                let cq = Arc::clone(device).create_cq_with(options)?;
                let srq = wants.shared.map(Shared::model);
                let options = QpOptions { srq, ..QpOptions::new(Transport::ReliableConnection, &cq) };
                Queue::Model(Arc::clone(pd).create_qp_with(options)?, cq)
            }
            #[cfg(feature = "verbs")]
            (Devices::Verbs(device), Pd::Verbs(pd)) => {
                let cq = match wants.channel {
                    Some((Channel::Verbs(channel), cookie)) => {
                        device.create_cq_with(wants.entries, channel, cookie)?
                    }
                    _ => device.create_cq(wants.entries)?,
                };
                let srq = match wants.shared {
                    Some(Shared::Verbs(srq)) => Some(Arc::clone(srq)),
                    _ => None,
                };
                let options = VerbsQpOptions { srq, inline: 64, ..VerbsQpOptions::new(&cq, 16) };
                Queue::Verbs(pd.create_qp_with(options)?, cq)
            }
            #[cfg(feature = "verbs")]
            _ => return Err("a domain of the other device".into()),
        })
    }

    /// Whether such an asynchronous event comes of the device of an end. Others are kept for who waits for them.
    pub fn hears(
        &self,
        end: End,
        wanted: impl Fn(&AsyncEvent) -> bool,
        patience: Duration,
    ) -> Result<bool, Error> {
        static HEARD: Mutex<Vec<(String, AsyncEvent)>> = Mutex::new(Vec::new());
        let of = format!("{} {}", self.name(), end as u8);
        let start = Instant::now();
        loop {
            let mut heard = HEARD.lock();
            while let Some(event) = self.next_event(end)? {
                heard.push((of.clone(), event));
            }
            if let Some(at) = heard.iter().position(|(device, event)| *device == of && wanted(event)) {
                heard.swap_remove(at);
                return Ok(true);
            }
            drop(heard);
            if start.elapsed() >= patience {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn next_event(&self, end: End) -> Result<Option<AsyncEvent>, Error> {
        match &self.devices {
            Devices::Model(machine) => {
                let device = if end == End::Responder { &machine.near } else { &machine.far };
                let events = device.async_events().ok_or("a model without asynchronous events")?;
                let event = events.next_within(Duration::ZERO);
                events.acknowledge(event.is_some().into());
                Ok(event)
            }
            #[cfg(feature = "verbs")]
            Devices::Verbs(device) => Ok(device.next_async_event(Duration::ZERO)?),
        }
    }
}

impl Pd {
    pub fn shared(&self, requests: u32) -> Result<Shared, Error> {
        Ok(match self {
            Self::Model(pd) => Shared::Model(Arc::clone(pd).create_srq(requests, 2)?),
            #[cfg(feature = "verbs")]
            Self::Verbs(pd) => Shared::Verbs(pd.create_srq(requests, 2)?),
        })
    }
}

impl Shared {
    fn model(&self) -> Arc<dyn SharedReceiveQueue> {
        match self {
            Self::Model(queue) => Arc::clone(queue),
            #[cfg(feature = "verbs")]
            Self::Verbs(_) => unreachable!("a queue of the other device"),
        }
    }

    pub fn post(&self, request: &RecvRequest<'_>) -> Result<(), Error> {
        match self {
            Self::Model(queue) => queue.post(request)?,
            #[cfg(feature = "verbs")]
            Self::Verbs(queue) => queue.post(request)?,
        }
        Ok(())
    }

    pub fn set_limit(&self, limit: u32) -> Result<(), Error> {
        match self {
            Self::Model(queue) => queue.set_limit(limit)?,
            #[cfg(feature = "verbs")]
            Self::Verbs(queue) => queue.set_limit(limit)?,
        }
        Ok(())
    }

    pub fn limit(&self) -> Result<u32, Error> {
        Ok(match self {
            Self::Model(queue) => queue.limit(),
            #[cfg(feature = "verbs")]
            Self::Verbs(queue) => queue.limit()?,
        })
    }

    pub fn number(&self) -> Srqn {
        match self {
            Self::Model(queue) => queue.number(),
            #[cfg(feature = "verbs")]
            Self::Verbs(queue) => queue.number(),
        }
    }
}

impl Channel {
    fn model(&self) -> Arc<dyn CompletionChannel> {
        match self {
            Self::Model(channel) => Arc::clone(channel),
            #[cfg(feature = "verbs")]
            Self::Verbs(_) => unreachable!("a channel of the other device"),
        }
    }

    /// What the queue of the next event is called.
    pub fn next(&self, patience: Duration) -> Result<Option<u64>, Error> {
        Ok(match self {
            Self::Model(channel) => channel.next_within(patience),
            #[cfg(feature = "verbs")]
            Self::Verbs(channel) => channel.next_within(patience)?,
        }
        .map(|event| event.cookie))
    }
}

impl Queue {
    pub fn arm(&self, notify: Notify) -> Result<(), Error> {
        match self {
            Self::Model(_, cq) => {
                cq.arm(notify);
            }
            #[cfg(feature = "verbs")]
            Self::Verbs(_, cq) => cq.arm(notify)?,
        }
        Ok(())
    }

    /// Counts events as dealt with; a real device's are when they are taken.
    pub fn acknowledge(&self, events: u32) {
        match self {
            Self::Model(_, cq) => cq.acknowledge_events(events),
            #[cfg(feature = "verbs")]
            Self::Verbs(..) => {}
        }
    }

    /// Has fewer events for more completions, where there is such a thing.
    pub fn moderate(&self, moderation: Moderation) -> Result<(), Error> {
        match self {
            Self::Model(_, cq) => Ok(cq.moderate(moderation)?),
            #[cfg(feature = "verbs")]
            Self::Verbs(..) => Err("no moderation".into()),
        }
    }

    pub fn resize(&self, entries: u32) -> Result<(), Error> {
        match self {
            Self::Model(_, cq) => cq.resize(entries)?,
            #[cfg(feature = "verbs")]
            Self::Verbs(_, cq) => cq.resize(entries)?,
        }
        Ok(())
    }

    pub fn number(&self) -> Qpn {
        match self {
            Self::Model(qp, _) => qp.endpoint().qpn,
            #[cfg(feature = "verbs")]
            Self::Verbs(qp, _) => qp.endpoint().qpn,
        }
    }
}
