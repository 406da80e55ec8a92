//! The same random calls on the modelled IOMMU and on the kernel's, and then the truth: a controller writes through the
//! IOVAs, and what it wrote must have landed where the model says, or nowhere.

use crate::bed::{Bed, PAGE, mapping};
use crate::calls::{Call, MEMORY, Outcome, Run, Stage};
use crate::nvme::{Controller, Data, Direction};
use hw_model::addr::{DmaAddr, Iova, PAGE_SHIFT, PhysAddr};
use hw_model::fault_plan::{FaultPlan, Points};
use hw_model::iommu::{Domain, DomainConfig, LeafSize};
use hw_model::sync::Arc;
use libtest_mimic::Failed;
use mr::dma::{DmaConfig, DmaDevice, IoSpace, Mapping};
use odp::space::process::OwnedMemory;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

/// Sequences, unless `ANYPAGE_VFIO_SEQUENCES` says another number.
const SEQUENCES: u64 = 1000;
/// Most calls of a sequence.
const CALLS: usize = 80;
/// IOVAs that the controller tries after a sequence.
const PROBES: usize = 4;

/// What happened, for the last line.
#[derive(Default)]
struct Counts {
    sequences: u64,
    calls: u64,
    injected: u64,
    refusals: BTreeMap<String, u64>,
    landed: u64,
    stopped: u64,
}

impl Counts {
    fn count(&mut self, outcome: Outcome) {
        self.calls += 1;
        match outcome {
            Outcome::Done | Outcome::Skipped => {}
            Outcome::Injected => self.injected += 1,
            Outcome::StillLinked(_) => *self.refusals.entry("StillLinked".to_owned()).or_default() += 1,
            refusal => *self.refusals.entry(format!("{refusal:?}")).or_default() += 1,
        }
    }
}

/// Every kind of refusal that the sequences are meant to meet.
const MET: [&str; 9] = [
    "BadRequest",
    "Range",
    "Unaligned",
    "AlreadyMapped",
    "Hole",
    "PartOfLeaf",
    "NoPool",
    "StillLinked",
    "Freed",
];

/// One of the two address spaces.
struct Side {
    space: Arc<dyn IoSpace>,
    device: Arc<DmaDevice>,
    plan: Arc<FaultPlan>,
    memory: PhysAddr,
}

impl Side {
    fn new(space: Arc<dyn IoSpace>, memory: PhysAddr) -> Self {
        let plan = FaultPlan::new(0, Vec::new());
        let config = DmaConfig { points: Points::with(&plan), ..DmaConfig::default() };
        let device = DmaDevice::over(Arc::clone(&space), config);
        Self { space, device, plan, memory }
    }

    fn begin(&self) -> Run {
        let (device, plan) = (Arc::clone(&self.device), Arc::clone(&self.plan));
        Run::new(Stage { device, plan, memory: self.memory })
    }

    /// Every IO page of every mapping: its address, where it leads, and bytes of the unit that it belongs to.
    fn pages(&self, run: &Run) -> Vec<(Iova, Option<PhysAddr>, u64)> {
        let mut pages = vec![];
        for mapping in run.slots.iter().flatten().filter(|mapping| !mapping.is_freed()) {
            let mut at = mapping.iova().page_start();
            while at.0 < mapping.iova().0 + mapping.len() {
                pages.push((at, self.space.iova_to_phys(at), self.space.leaf_at(at).unwrap_or(0)));
                at = at.offset(PAGE);
            }
        }
        pages
    }
}

/// If the two differed, one of them would be no model of the other.
pub fn sequences(bed: &Bed) -> Result<(), Failed> {
    let wanted = match std::env::var("ANYPAGE_VFIO_SEQUENCES") {
        Ok(number) => number.parse()?,
        Err(_) => SEQUENCES,
    };
    let container = bed.container()?;
    let (memory, base) = bed.memory(MEMORY / PAGE);
    let controller = Controller::start(&container, bed.address, &bed.space)?;
    let queues = container.limits().pinned;
    let mut probe = Probe::new(controller, mapping(&container, MEMORY), memory, base)?;
    let model = Domain::new(DomainConfig { width: container.width(), ..DomainConfig::default() })?;
    let real = Side::new(Arc::clone(&container) as _, base);
    let modelled = Side::new(Arc::clone(&model) as _, base);
    assert_eq!(modelled.space.reserved(), real.space.reserved());
    // What the controller and the probe have reserved on the kernel's side is taken here too, so that both allocators
    // give the same.
    let twin = |len| Mapping::try_alloc(&modelled.device, len, 0);
    let _twins = [twin(queues)?, twin(MEMORY)?];

    let mut counts = Counts::default();
    for seed in 0..wanted {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let (mut expected, mut got) = (modelled.begin(), real.begin());
        for number in 0..random.random_range(1..CALLS) {
            let call = Call::decode(random.random(), 1 << PAGE_SHIFT);
            let (model, kernel) = (expected.step(&call), got.step(&call));
            assert_eq!(model, kernel, "sequence {seed}, call {number}: {call:?}");
            counts.count(kernel.outcome);
        }
        let (pages, kernels) = (modelled.pages(&expected), real.pages(&got));
        assert_eq!(pages.len(), kernels.len(), "sequence {seed}");
        for (model, kernel) in pages.iter().zip(&kernels) {
            assert_eq!(model, kernel, "sequence {seed}: an IO page, where it leads, its unit");
        }
        let limits = container.limits();
        assert_eq!(limits.pinned - queues - MEMORY, model.stats().mapped_bytes, "sequence {seed}");
        let free = container.info()?.entries_left.expect("the kernel says it");
        let most = limits.most_entries.expect("likewise");
        assert_eq!(limits.entries + u64::from(free), u64::from(most), "sequence {seed}");
        probe.try_some(seed, &pages, &mut random, &mut counts)?;
        expected.finish();
        got.finish();
        assert_eq!(
            (container.limits().pinned, container.surprises()),
            (queues + MEMORY, 0),
            "sequence {seed}"
        );
        counts.sequences += 1;
    }
    for kind in MET {
        assert!(counts.refusals.contains_key(kind), "no sequence met {kind}: {:?}", counts.refusals);
    }
    assert!(counts.landed > 0 && counts.stopped > 0);
    report(&counts);
    Ok(())
}

fn report(counts: &Counts) {
    let Counts { sequences, calls, injected, refusals, landed, stopped } = counts;
    println!("refusals by kind: {refusals:?}; steps that were made to fail: {injected}");
    println!("writes of the controller: {landed} landed where the model says, {stopped} landed nowhere");
    let refusals: u64 = refusals.values().sum();
    println!("sequences {sequences}, calls {calls}, refusals {refusals}, unexplained differences 0");
}

/// A controller that writes marks through IOVAs.
struct Probe {
    controller: Controller,
    pool: OwnedMemory,
    base: PhysAddr,
    mark: u64,
    /// All of the pool, for the marks to come from.
    own: Mapping,
}

impl Probe {
    fn new(controller: Controller, own: Mapping, pool: OwnedMemory, base: PhysAddr) -> Result<Self, Failed> {
        own.link(0, base, pool.size(), LeafSize::Large)?;
        own.sync(0, pool.size())?;
        Ok(Self { controller, pool, base, mark: 0, own })
    }

    fn block(&self) -> u64 {
        self.controller.identity().block
    }

    /// Has the disk keep a block that begins with a mark never used before.
    fn new_mark(&mut self) -> Result<(), Failed> {
        self.mark += 1;
        self.pool.write_at(0, &self.mark.to_le_bytes())?;
        let data = Data::Prp(self.own.dma_address(0), DmaAddr(0));
        self.controller.transfer(Direction::Write, 0, 1, data)?;
        self.pool.write_at(0, &0_u64.to_le_bytes())?;
        Ok(())
    }

    /// The pages of the pool that begin with the mark.
    fn marked(&self) -> Result<Vec<PhysAddr>, Failed> {
        let mut found = vec![];
        let mut word = [0; 8];
        for page in 0..self.pool.size() / PAGE {
            self.pool.read_at(page * PAGE, &mut word)?;
            if u64::from_le_bytes(word) == self.mark {
                found.push(self.base.offset(page * PAGE));
            }
        }
        Ok(found)
    }

    /// Writes through some of the IOVAs that the model knows.
    fn try_some(
        &mut self,
        seed: u64,
        pages: &[(Iova, Option<PhysAddr>, u64)],
        random: &mut ChaCha8Rng,
        counts: &mut Counts,
    ) -> Result<(), Failed> {
        let linked: Vec<_> = pages.iter().filter(|(_, phys, _)| phys.is_some()).copied().collect();
        for _ in 0..PROBES.min(pages.len()) {
            // Half of them among those that lead somewhere, if there are any.
            let among = if random.random_ratio(1, 2) && !linked.is_empty() { &linked[..] } else { pages };
            let (iova, phys, _) = among[random.random_range(0..among.len())];
            self.new_mark()?;
            let data = Data::Prp(iova.to_dma(), DmaAddr(0));
            // A write that is stopped need not be an error to the controller.
            let said = self.controller.transfer(Direction::Read, 0, 1, data);
            let expected: Vec<_> = phys.into_iter().collect();
            let found = self.marked()?;
            assert_eq!(found, expected, "sequence {seed}: a write through {iova}, which ended with {said:?}");
            match phys {
                Some(phys) => {
                    self.pool.write_at(phys.0 - self.base.0, &vec![0; self.block() as usize])?;
                    counts.landed += 1;
                }
                None => counts.stopped += 1,
            }
        }
        Ok(())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.own.unlink(0, self.pool.size()).expect("linked as a whole");
    }
}
