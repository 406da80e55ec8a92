//! The world and what happens in it next.

use super::aliases::Alias;
use super::buffers::{Buffer, BufferChange, Exportable};
use super::choices::{Choices, Trace};
use super::implicit::{Leaving, Whole};
use super::memory::{Memory, Piece};
use super::network::Network;
use super::reregs::Changing;
use super::{Broken, Counts};
use hw_model::addr::VirtAddr;
use hw_model::bus::Drain;
use hw_model::fault_plan::FaultPlan;
use hw_model::hca::{Key, Sge, Step, Time, Transport};
use hw_model::sync::Arc;
use mr::device::model::{Advice, FaultJob, ModelDevice, ModelPd, ModelRegion, PrefetchJob, Registration};
use mr::{CompletionQueue, QueuePair, Teardown};
use odp::space::sim::{DeviceMemoryId, ObjectId, SimHost, SimOp, SimPin, SimSpace};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// How a world is made and watched.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which points fail, with which probability; `None` lets the seed decide.
    pub plan: Option<Vec<(String, f64)>>,
    /// Keep a line for everything that happens.
    pub log: bool,
}

/// A machine.
pub struct Host {
    pub(super) sim: Arc<SimHost>,
    pub(super) shmem: ObjectId,
    pub(super) file: ObjectId,
    pub(super) private_file: ObjectId,
    pub(super) hugetlb: ObjectId,
    pub(super) dmabuf: ObjectId,
    pub(super) coherent: DeviceMemoryId,
    pub(super) private: DeviceMemoryId,
    pub(super) devices: Vec<usize>,
    pub(super) next_arena: u64,
    /// What its driver exports.
    pub(super) exportable: Exportable,
    /// The buffers that it was and is, as processes; the last is the one that lives.
    pub(super) exports: Vec<usize>,
}

/// An HCA and what software keeps of it.
pub struct Dev {
    pub(super) host: usize,
    pub(super) device: Arc<ModelDevice>,
    pub(super) pd: Arc<ModelPd>,
    pub(super) cq: Arc<dyn CompletionQueue>,
    pub(super) plan: Option<Arc<FaultPlan>>,
    /// Its engine had nothing to do, and when it will.
    pub(super) asleep: Option<Option<Time>>,
    /// Whether it has a way to the device memories of its host.
    pub(super) reaches_peers: bool,
    /// Page faults being handled.
    pub(super) jobs: Vec<FaultJob>,
    /// Prefetches being carried out.
    pub(super) prefetches: Vec<PrefetchJob>,
}

impl Dev {
    /// Whether page faults wait for software.
    pub(super) fn has_faults(&self) -> bool {
        !self.jobs.is_empty() || !self.device.hca().faults().is_empty()
    }

    /// Failures injected so far.
    pub(super) fn injected(&self) -> u64 {
        self.plan.as_ref().map_or(0, |plan| plan.fired().iter().map(|(_, fired)| fired).sum())
    }
}

/// A program.
pub struct Process {
    pub(super) host: usize,
    /// `None` once it has ended.
    pub(super) space: Option<Arc<SimSpace>>,
    /// It is none, but a buffer.
    pub(super) buffer: Option<Buffer>,
    /// First page of its memory.
    pub(super) arena: u64,
}

impl Process {
    /// Whether its memory is gone.
    pub(super) fn has_ended(&self) -> bool {
        self.space.is_none() && self.buffer.is_none()
    }
}

/// A region, or one on its way in or out.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub(super) device: usize,
    pub(super) process: usize,
    pub(super) at: VirtAddr,
    pub(super) len: u64,
    /// Its region is kept in hugetlb pages.
    pub(super) huge: bool,
}

/// A registered region.
pub struct Slot {
    pub(super) place: Place,
    pub(super) region: Arc<ModelRegion>,
}

/// Two connected queue pairs.
pub struct Connection {
    pub(super) devices: [usize; 2],
    pub(super) service: Transport,
    pub(super) qps: [Arc<dyn QueuePair>; 2],
    /// A request of it has failed.
    pub(super) broken: bool,
    /// It is being taken down.
    pub(super) closing: bool,
    /// Disturbances there had been when the first read of it that succeeded was posted. A packet that comes late makes the
    /// responder do it again (IBTA volume 1, 9.7.5), and what it reads may be gone by then: that ends the connection from
    /// the other side.
    pub(super) haunted_from: Option<u64>,
    /// Transfers that failed, and those of unreliable services that were sent: they may still land.
    pub(super) ended_badly: Vec<u64>,
    /// Whether a receive was posted at an end: an unreliable service has one.
    pub(super) received: [bool; 2],
}

/// A posted request that has not ended.
pub struct Request {
    pub(super) connection: usize,
    pub(super) is_read: bool,
    /// The oracle follows it. One that must fail changes nothing, so there is nothing to follow.
    pub(super) followed: bool,
    pub(super) keys: Vec<Key>,
    pub(super) devices: [usize; 2],
    pub(super) target: Vec<Piece>,
    pub(super) injected: u64,
    /// Packets that had overtaken others when it was posted.
    pub(super) overtaken: u64,
    /// [`World::hastened`] when it was posted.
    pub(super) hastened: u64,
    /// [`World::disturbances`] when it was posted.
    pub(super) disturbances: u64,
    /// It makes a key, or ends one.
    pub(super) manages: bool,
    /// Where the route header of a datagram goes.
    pub(super) header: Option<Sge>,
    /// Its receive has ended, before it did.
    pub(super) landed: bool,
}

/// Transfers of queue pairs that are gone, until the bursts of then are over.
pub struct Retired {
    pub(super) transfers: Vec<u64>,
    pub(super) drains: Vec<(usize, Drain)>,
}

/// A change of memory that has begun.
pub struct Change {
    pub(super) host: usize,
    pub(super) process: Option<usize>,
    pub(super) op: SimOp,
}

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Engine,
    Deliver,
    Fault,
    Prefetch,
    Change,
    ChangeOn,
    Parked,
    Post,
    BadPost,
    Read,
    Write,
    Register,
    RegisterOn,
    Deregister,
    Rereg,
    ReregOn,
    TeardownOn,
    Advise,
    AdviseOn,
    Reconnect,
    Exit,
    Check,
    Wait,
}

/// Kinds of changes that are switched on or off by the run: which pages go, and why.
pub const CHANGES: usize = 26;

/// What this run does much of, and what not at all.
pub struct Swarm {
    weights: Vec<(Action, u32)>,
    total: u32,
    pub(super) changes: [bool; CHANGES],
}

impl Swarm {
    pub(super) fn new(choices: &mut Choices) -> Self {
        /// Steps that bring what was begun to an end. They are never switched off.
        const ALWAYS: &[(Action, u32)] = &[
            (Action::Engine, 600),
            (Action::Deliver, 240),
            (Action::Fault, 150),
            (Action::Prefetch, 60),
            (Action::ChangeOn, 60),
            (Action::Parked, 25),
            (Action::RegisterOn, 110),
            (Action::TeardownOn, 30),
            (Action::ReregOn, 40),
            (Action::AdviseOn, 35),
            (Action::Post, 70),
            (Action::Register, 30),
            (Action::Reconnect, 40),
        ];
        const SOMETIMES: &[(Action, u32)] = &[
            (Action::Change, 30),
            (Action::BadPost, 1),
            (Action::Read, 20),
            (Action::Write, 20),
            (Action::Deregister, 3),
            (Action::Rereg, 5),
            (Action::Advise, 6),
            (Action::Exit, 2),
            (Action::Check, 3),
            (Action::Wait, 4),
        ];
        let mut weights: Vec<(Action, u32)> = Vec::new();
        for (action, weight) in ALWAYS {
            weights.push((*action, weight * choices.of(&[1, 1, 2])));
        }
        for (action, weight) in SOMETIMES {
            weights.push((*action, weight * choices.of(&[1, 2, 0, 1, 4])));
        }
        let total = weights.iter().map(|(_, weight)| weight).sum();
        let changes = std::array::from_fn(|_| !choices.chance(300));
        Self { weights, total, changes }
    }

    fn pick(&self, choices: &mut Choices) -> Action {
        let mut left = choices.below(self.total);
        for (action, weight) in &self.weights {
            if left < *weight {
                return *action;
            }
            left -= weight;
        }
        Action::Engine
    }
}

/// Hosts, devices, processes, a network, and one thread that decides everything.
pub struct World {
    pub(super) choices: Choices,
    pub(super) network: Network,
    /// Payload of a full packet.
    pub(super) mtu: u32,
    pub(super) lossy: bool,
    pub(super) swarm: Swarm,
    pub(super) now: Time,
    /// How often time went on although somebody had something to do: each may have cost a requester a try.
    pub(super) hastened: u64,
    pub(super) memory: Memory,
    pub(super) hosts: Vec<Host>,
    pub(super) devices: Vec<Dev>,
    pub(super) processes: Vec<Process>,
    pub(super) regions: Vec<Slot>,
    pub(super) registrations: Vec<(Place, Registration)>,
    pub(super) reregs: Vec<Changing>,
    pub(super) wholes: Vec<Whole>,
    pub(super) leaving: Vec<Leaving>,
    pub(super) aliases: Vec<Alias>,
    pub(super) advices: Vec<(Place, Advice)>,
    pub(super) teardowns: Vec<(Place, Teardown)>,
    pub(super) connections: Vec<Connection>,
    pub(super) requests: BTreeMap<u64, Request>,
    /// The connections of receives that have not ended, by the requests that they are for.
    pub(super) receives: BTreeMap<u64, usize>,
    pub(super) retired: Vec<Retired>,
    pub(super) changes: Vec<Change>,
    pub(super) buffer_changes: Vec<BufferChange>,
    /// Pages that somebody holds where they are.
    pub(super) pins: Vec<SimPin>,
    /// Regions that went, and changes that took away pages or rights.
    pub(super) disturbances: u64,
    /// Keys of regions that are gone, with the device and an address they had.
    pub(super) dead_keys: Vec<(usize, Key, u64)>,
    pub(super) counts: Counts,
    pub(super) next_id: u64,
    pub(super) stamp: u64,
    /// Regions checked so far: which is next.
    pub(super) checked: usize,
    pub(super) log: Option<Vec<String>>,
    pub(super) digest: DefaultHasher,
}

impl World {
    /// One step.
    ///
    /// # Errors
    /// [`Broken`] if something is not as it must be.
    pub fn step(&mut self) -> Result<(), Broken> {
        self.choices.next_step();
        self.now = self.now.after(u64::from(self.choices.below(400)) + 50);
        let action = self.swarm.pick(&mut self.choices);
        action.hash(&mut self.digest);
        self.counts.one("steps");
        match action {
            Action::Engine => self.step_some_engine()?,
            Action::Deliver => self.deliver(),
            Action::Fault => self.step_some_fault(),
            Action::Prefetch => self.step_some_prefetch(),
            Action::Change => self.begin_change()?,
            Action::ChangeOn => self.step_some_change()?,
            Action::Parked => self.poll_parked(),
            Action::Post => self.post()?,
            Action::BadPost => self.post_badly()?,
            Action::Read => self.read_some()?,
            Action::Write => self.write_some()?,
            Action::Register => self.begin_registration()?,
            Action::RegisterOn => self.step_some_registration()?,
            Action::Deregister => self.begin_deregistration(),
            Action::Rereg => self.begin_rereg()?,
            Action::ReregOn => self.step_some_rereg()?,
            Action::TeardownOn => self.step_some_teardown()?,
            Action::Advise => self.begin_advice(),
            Action::AdviseOn => self.step_some_advice()?,
            Action::Reconnect => self.reconnect_some()?,
            Action::Exit => self.end_some_process()?,
            Action::Check => self.check_everything()?,
            Action::Wait => self.wait(),
        }
        self.finish_retired();
        self.check_next()
    }

    /// A number that tells this run from others.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.digest.finish()
    }

    /// What was decided so far.
    #[must_use]
    pub fn trace(&self) -> &Trace {
        self.choices.made()
    }

    /// Takes the lines that were kept.
    pub fn take_log(&mut self) -> Vec<String> {
        self.log.take().unwrap_or_default()
    }

    /// What happened.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            let step = self.choices.made().steps.len();
            log.push(format!("{step:5} {:>10} ns  {}", self.now.0, line()));
        }
    }

    pub(super) fn space(&self, process: usize) -> &Arc<SimSpace> {
        self.processes[process].space.as_ref().expect("a process that has not ended")
    }

    /// Processes that have not ended, of one host or of all.
    pub(super) fn living(&self, host: Option<usize>) -> Vec<usize> {
        let lives =
            |process: &Process| process.space.is_some() && host.is_none_or(|host| process.host == host);
        self.processes
            .iter()
            .enumerate()
            .filter(|(_, process)| lives(process))
            .map(|(index, _)| index)
            .collect()
    }

    pub(super) fn some_process(&mut self, host: Option<usize>) -> Option<usize> {
        let living = self.living(host);
        self.choices.index(living.len()).map(|index| living[index])
    }

    /// A mapped page of a process.
    pub(super) fn some_page(&mut self, process: usize) -> Option<u64> {
        let count = self.memory.pages(process).count();
        // Near the beginning, where the small mappings are; huge ones would be all there is otherwise.
        let most = if self.choices.chance(200) { count } else { count.min(64) };
        let nth = self.choices.index(most)?;
        self.memory.pages(process).nth(nth).map(|(page, _)| page)
    }

    /// Bytes that nobody has seen before.
    pub(super) fn fresh_bytes(&mut self, len: usize) -> Vec<u8> {
        self.stamp = self.stamp.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let mut word = self.stamp;
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            word = word.wrapping_mul(0x2545_f491_4f6c_dd1d).rotate_left(17) ^ self.stamp;
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    // Engines, packets, time.

    pub(super) fn wakes(&self, device: usize) -> bool {
        match self.devices[device].asleep {
            None => true,
            Some(wake_at) => wake_at.is_some_and(|at| at <= self.now),
        }
    }

    fn step_some_engine(&mut self) -> Result<(), Broken> {
        let awake: Vec<usize> = (0..self.devices.len()).filter(|device| self.wakes(*device)).collect();
        match self.choices.index(awake.len()) {
            Some(index) => self.step_engine(awake[index]),
            None => {
                if self.network.next_due().is_none_or(|due| due > self.now) {
                    self.wait();
                } else {
                    self.deliver();
                }
                Ok(())
            }
        }
    }

    pub(super) fn step_engine(&mut self, device: usize) -> Result<(), Broken> {
        let step = self.devices[device].device.hca().step_engine(0, self.now);
        self.devices[device].asleep = match step {
            Step::Worked | Step::Blocked => None,
            Step::Idle { wake_at } => Some(wake_at),
        };
        self.note(|| format!("engine {device}: {step:?}"));
        self.network.collect(self.now, &mut self.choices);
        self.collect_completions(device)?;
        self.check_device(device)
    }

    fn deliver(&mut self) {
        if let Some((to, line)) = self.network.deliver(self.now, self.log.is_some()) {
            let device = self.devices.iter().position(|dev| dev.device.hca().gid() == to);
            if let Some(device) = device {
                self.devices[device].asleep = None;
                self.note(|| format!("packet for {device}: {}", line.unwrap_or_default()));
            }
        }
    }

    /// Delivers what is due; whether something was.
    pub(super) fn deliver_all(&mut self) -> bool {
        let mut some = false;
        while self.network.next_due().is_some_and(|due| due <= self.now) {
            self.deliver();
            some = true;
        }
        some
    }

    /// Nothing happens until something is due.
    pub(super) fn wait(&mut self) {
        let timers = self.devices.iter().filter_map(|dev| dev.asleep.flatten());
        let next = timers.chain(self.network.next_due()).filter(|time| *time > self.now).min();
        if let Some(next) = next {
            self.hastened += u64::from(self.somebody_could_act());
            self.now = next;
            self.note(|| "time passes".to_owned());
            self.counts.one("waits for time");
        }
    }

    /// Whether something could happen without waiting for it.
    fn somebody_could_act(&self) -> bool {
        self.network.next_due().is_some_and(|due| due <= self.now)
            || (0..self.devices.len()).any(|device| self.wakes(device) || self.devices[device].has_faults())
    }

    fn poll_parked(&mut self) {
        let count = self.hosts.len();
        if let Some(host) = self.choices.index(count) {
            let left = self.hosts[host].sim.poll_parked();
            if left > 0 {
                self.counts.one("copies on write that waited for a burst");
            }
        }
    }
}
