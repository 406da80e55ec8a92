//! The devices that the suite runs on, behind one face.

use anypage::machine::{Machine, MachineConfig};
use hw_model::hca::{Completion, SendRequest};
use hw_model::sync::Arc;
#[cfg(feature = "verbs")]
use mr::device::verbs::{Capability, VerbsCq, VerbsDevice, VerbsPd, VerbsQp, VerbsQpOptions};
use mr::{CompletionQueue, Device, Mode, ProtectionDomain, QueuePair, Region, RegisterOptions};
use odp::space::process::{Options, ProcessSpace};
use odp::space::{AddressSpace, Rung, UserRange};
use std::time::{Duration, Instant};

/// A request that takes longer never ends.
const PATIENCE: Duration = Duration::from_secs(60);

type Error = Box<dyn std::error::Error + Send + Sync>;

/// What a difference is said of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The model, behind an IOMMU or not.
    Model,
    /// rdma_rxe.
    Rxe,
}

pub enum Devices {
    Model(Machine),
    #[cfg(feature = "verbs")]
    Verbs(Arc<VerbsDevice>),
}

pub struct Rig {
    name: String,
    pub space: Arc<ProcessSpace>,
    pub devices: Devices,
}

/// A protection domain of either.
#[derive(Clone)]
pub enum Pd {
    Model(Arc<dyn ProtectionDomain>),
    #[cfg(feature = "verbs")]
    Verbs(Arc<VerbsPd>),
}

/// A queue pair and where it completes.
pub enum Queue {
    Model(Arc<dyn QueuePair>, Arc<dyn CompletionQueue>),
    #[cfg(feature = "verbs")]
    Verbs(Arc<VerbsQp>, Arc<VerbsCq>),
}

/// Which of the two ends of a connection: two devices of the model, twice the one that is real.
#[derive(Clone, Copy, PartialEq)]
pub enum End {
    Responder,
    Requester,
}

pub fn all() -> Vec<Rig> {
    let open = || ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let model = |name: &str, iommu| {
        let space = open();
        let config = MachineConfig { iommu, ..MachineConfig::default() };
        let machine = Machine::new(space.memory(), None, &config).expect("a machine");
        Rig { name: name.to_owned(), space, devices: Devices::Model(machine) }
    };
    #[cfg_attr(not(feature = "verbs"), expect(unused_mut, reason = "no more come without the feature"))]
    let mut rigs = vec![model("model", true), model("model without IOMMU", false)];
    #[cfg(feature = "verbs")]
    if let Ok(name) = std::env::var("ANYPAGE_LAB_DEVICE") {
        let device = VerbsDevice::open(&name).unwrap_or_else(|error| panic!("{error}"));
        rigs.push(Rig { name, space: open(), devices: Devices::Verbs(device) });
    }
    rigs
}

/// Why no real device is among them.
pub fn no_device() -> Option<&'static str> {
    if cfg!(not(feature = "verbs")) {
        return Some("built without the feature verbs");
    }
    std::env::var_os("ANYPAGE_LAB_DEVICE")
        .is_none()
        .then_some("ANYPAGE_LAB_DEVICE names none; tests/lab/conformance has one")
}

impl Rig {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn kind(&self) -> Kind {
        match self.devices {
            Devices::Model(_) => Kind::Model,
            #[cfg(feature = "verbs")]
            Devices::Verbs(_) => Kind::Rxe,
        }
    }

    /// Why it cannot have regions of `mode`, under which memory changes.
    pub fn lacks(&self, mode: Mode, changes_memory: bool) -> Option<String> {
        if mode == Mode::OnDemand && !self.has_on_demand() {
            return Some(format!("{} has no ODP", self.name));
        }
        // Who keeps the region true is the kernel, or, for the model, this process: which must hear of changes then.
        let deaf = self.kind() == Kind::Model && self.space.capabilities().rung == Rung::Poll;
        (deaf && changes_memory).then(|| format!("userfaultfd {}", self.space.capabilities().userfaultfd))
    }

    fn has_on_demand(&self) -> bool {
        match &self.devices {
            Devices::Model(_) => true,
            #[cfg(feature = "verbs")]
            Devices::Verbs(device) => device.capabilities().has(Capability::OnDemand),
        }
    }

    pub fn domain(&self, end: End) -> Result<Pd, Error> {
        Ok(match &self.devices {
            Devices::Model(machine) => {
                let device = if end == End::Responder { &machine.near } else { &machine.far };
                Pd::Model(Arc::clone(device).alloc_pd()?)
            }
            #[cfg(feature = "verbs")]
            Devices::Verbs(device) => Pd::Verbs(device.alloc_pd()?),
        })
    }

    /// A queue pair, not connected, that 64 bytes can be sent inline through.
    pub fn queue(&self, end: End, pd: &Pd) -> Result<Queue, Error> {
        Ok(match (&self.devices, pd) {
            (Devices::Model(machine), Pd::Model(pd)) => {
                let device = if end == End::Responder { &machine.near } else { &machine.far };
                let cq = Arc::clone(device).create_cq(64)?;
                Queue::Model(Arc::clone(pd).create_qp(Arc::clone(&cq), 16)?, cq)
            }
            #[cfg(feature = "verbs")]
            (Devices::Verbs(device), Pd::Verbs(pd)) => {
                let cq = device.create_cq(64)?;
                let options = VerbsQpOptions { inline: 64, ..VerbsQpOptions::new(&cq, 16) };
                Queue::Verbs(pd.create_qp_with(options)?, cq)
            }
            #[cfg(feature = "verbs")]
            _ => return Err("a domain of the other device".into()),
        })
    }

    /// A connected pair: responder first.
    pub fn pair(&self, responder: &Pd, requester: &Pd) -> Result<(Queue, Queue), Error> {
        let pair = (self.queue(End::Responder, responder)?, self.queue(End::Requester, requester)?);
        match (&pair.0, &pair.1) {
            (Queue::Model(one, _), Queue::Model(other, _)) => {
                one.connect(other.endpoint())?;
                other.connect(one.endpoint())?;
            }
            #[cfg(feature = "verbs")]
            (Queue::Verbs(one, _), Queue::Verbs(other, _)) => {
                one.connect(other.endpoint())?;
                other.connect(one.endpoint())?;
            }
            #[cfg(feature = "verbs")]
            _ => return Err("queue pairs of two devices".into()),
        }
        Ok(pair)
    }
}

impl Pd {
    pub fn register(&self, memory: &UserRange, options: RegisterOptions) -> Result<Arc<dyn Region>, Error> {
        Ok(match self {
            Self::Model(pd) => Arc::clone(pd).register(memory, options)?,
            #[cfg(feature = "verbs")]
            Self::Verbs(pd) => pd.register(memory, options)?,
        })
    }
}

impl Queue {
    pub fn post(&self, request: &SendRequest<'_>) -> Result<(), Error> {
        match self {
            Self::Model(qp, _) => qp.post_send(request)?,
            #[cfg(feature = "verbs")]
            Self::Verbs(qp, _) => qp.post_send(request)?,
        }
        Ok(())
    }

    /// What is there now.
    pub fn poll(&self) -> Result<Option<Completion>, Error> {
        let mut found = Vec::new();
        let _count = match self {
            Self::Model(_, cq) => cq.poll(&mut found, 1)?,
            #[cfg(feature = "verbs")]
            Self::Verbs(_, cq) => cq.poll(&mut found, 1)?,
        };
        Ok(found.pop())
    }

    /// The next completion.
    pub fn completion(&self) -> Result<Completion, Error> {
        self.completion_within(PATIENCE)?.ok_or_else(|| "a posted request never ended".into())
    }

    /// The same, if one comes in that time.
    pub fn completion_within(&self, patience: Duration) -> Result<Option<Completion>, Error> {
        let start = Instant::now();
        while start.elapsed() < patience {
            if let Some(found) = self.poll()? {
                return Ok(Some(found));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(None)
    }
}
