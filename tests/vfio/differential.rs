//! The same random calls on the modelled IOMMU and on the kernel's, and then the truth: a controller writes through the
//! IOVAs, and what it wrote must have landed where the model says, or nowhere.

use crate::bed::{Bed, PAGE};
use crate::differences::DIFFERENCES;
use crate::nvme::{Controller, Data, Direction};
use crate::sequence::{Answer, POOL, SLOTS, Side, sequence};
use hw_model::addr::{DmaAddr, Iova, PhysAddr};
use hw_model::iommu::{Domain, DomainConfig, MapError, UnmapError};
use hw_model::sync::Arc;
use libtest_mimic::Failed;
use mr::dma::{DestroyError, DmaConfig, DmaDevice, IoSpace, LinkError, Mapping, UnlinkError};
use odp::space::process::OwnedMemory;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

/// Sequences, unless `ANYPAGE_VFIO_SEQUENCES` says another number.
const SEQUENCES: u64 = 2000;
/// IOVAs that the controller tries after a sequence.
const PROBES: usize = 3;

/// What happened, for the last line.
#[derive(Default)]
struct Counts {
    sequences: u64,
    calls: u64,
    refusals: BTreeMap<&'static str, u64>,
    explained: BTreeMap<&'static str, u64>,
    landed: u64,
    stopped: u64,
}

/// What kind of refusal an answer is, if it is one.
fn refusal(answer: &Answer) -> Option<&'static str> {
    let unlink = |error: &UnlinkError| match error {
        UnlinkError::Range(_) => "range",
        UnlinkError::Unmap(UnmapError::Hole { .. }) => "hole",
        UnlinkError::Unmap(UnmapError::PartOfLeaf { .. }) => "part of a unit",
        UnlinkError::Unmap(_) => "unmap",
        UnlinkError::Freed { .. } => "freed",
    };
    Some(match answer {
        Answer::Skipped | Answer::Reserved(..) | Answer::Done => return None,
        Answer::Exhausted(_) => "no IOVA",
        Answer::Link(LinkError::Range(_)) => "range",
        Answer::Link(LinkError::Unaligned { .. }) => "unaligned",
        Answer::Link(LinkError::Map(MapError::AlreadyMapped { .. })) => "linked already",
        Answer::Link(LinkError::Map(MapError::Host { .. })) => "host",
        Answer::Link(LinkError::Freed { .. }) => "freed",
        Answer::Link(_) => "link",
        Answer::Unlink(error) | Answer::Destroy(DestroyError::Unlink(error)) => unlink(error),
        Answer::StillLinked(_) | Answer::Destroy(DestroyError::StillLinked(_)) => "still linked",
    })
}

/// Every kind that the sequences are meant to meet.
const MET: [&str; 9] = [
    "no IOVA",
    "range",
    "unaligned",
    "linked already",
    "host",
    "freed",
    "hole",
    "part of a unit",
    "still linked",
];

/// If the two differed and the table of differences did not say so, one of them would be no model of the other.
pub fn sequences(bed: &Bed) -> Result<(), Failed> {
    let wanted = match std::env::var("ANYPAGE_VFIO_SEQUENCES") {
        Ok(number) => number.parse()?,
        Err(_) => SEQUENCES,
    };
    let container = bed.container()?;
    let (memory, pool) = bed.memory(POOL / PAGE);
    let mut probe = Probe::new(Controller::start(&container, bed.address, &bed.space)?, memory, pool)?;
    let queues = container.limits().pinned - POOL;
    let model = Domain::new(DomainConfig { width: container.width(), ..DomainConfig::default() })?;
    let mut real = Side::new(Arc::clone(&container) as _, Arc::clone(probe.controller.dma()), pool);
    let device = DmaDevice::over(Arc::clone(&model) as _, DmaConfig::default());
    // What the controller and the probe have reserved on the kernel's side is taken here too, so that both allocators
    // give the same.
    let _twins = [queues, POOL].map(|len| Mapping::try_alloc(&device, len, 0).map(Option::unwrap));
    let mut modelled = Side::new(Arc::clone(&model) as _, device, pool);
    assert_eq!(modelled.space.reserved(), real.space.reserved());

    let mut counts = Counts::default();
    for seed in 0..wanted {
        run(seed, &mut modelled, &mut real, &mut counts)?;
        let left = container.limits();
        assert_eq!(left.pinned - queues - POOL, model.stats().mapped_bytes, "sequence {seed}");
        let free = container.info()?.entries_left.expect("the kernel says it");
        assert_eq!(left.entries + u64::from(free), u64::from(left.most_entries.expect("likewise")));
        probe.try_some(seed, &modelled, &mut counts)?;
        modelled.close();
        real.close();
        assert_eq!((container.limits().pinned, container.surprises()), (queues + POOL, 0), "sequence {seed}");
        counts.sequences += 1;
    }
    for kind in MET {
        assert!(counts.refusals.contains_key(kind), "no sequence met {kind:?}: {:?}", counts.refusals);
    }
    assert!(counts.landed > 0 && counts.stopped > 0);
    report(&counts);
    Ok(())
}

fn report(counts: &Counts) {
    let Counts { sequences, calls, refusals, explained, landed, stopped } = counts;
    println!("refusals by kind: {refusals:?}");
    println!("explained differences: {explained:?}");
    println!("writes of the controller: {landed} landed where the model says, {stopped} landed nowhere");
    let refusals: u64 = refusals.values().sum();
    let explained: u64 = explained.values().sum();
    println!(
        "sequences {sequences}, calls {calls}, refusals {refusals}, explained differences {explained}, unexplained \
         differences 0"
    );
}

/// Runs sequence `seed` on both sides.
fn run(seed: u64, modelled: &mut Side, real: &mut Side, counts: &mut Counts) -> Result<(), Failed> {
    for (number, (slot, call)) in sequence(seed).into_iter().enumerate() {
        let (expected, got) = (modelled.run(slot, &call), real.run(slot, &call));
        counts.calls += 1;
        if let Some(kind) = refusal(&got) {
            *counts.refusals.entry(kind).or_default() += 1;
        }
        if expected != got {
            let known = DIFFERENCES.iter().find(|difference| (difference.explains)(&expected, &got));
            let Some(difference) = known else {
                let what = format!("sequence {seed}, call {number}, mapping {slot}: {call:?}");
                return Err(format!("{what}\n  model:  {expected:?}\n  kernel: {got:?}").into());
            };
            *counts.explained.entry(difference.name).or_default() += 1;
            modelled.undo(slot, &call);
        }
        assert_eq!(modelled.linked(slot), real.linked(slot), "sequence {seed}, call {number}: {call:?}");
    }
    for slot in 0..SLOTS {
        for (expected, got) in modelled.pages(slot).into_iter().zip(real.pages(slot)) {
            assert_eq!(expected, got, "sequence {seed}, mapping {slot}: an IO page");
        }
    }
    Ok(())
}

/// A controller that writes marks through IOVAs.
struct Probe {
    controller: Controller,
    pool: OwnedMemory,
    base: PhysAddr,
    mark: u64,
    /// The pool as the controller wrote the marks to disk from, and the disk's bytes go nowhere else.
    own: Mapping,
}

impl Probe {
    fn new(controller: Controller, pool: OwnedMemory, base: PhysAddr) -> Result<Self, Failed> {
        let own = Mapping::try_alloc(controller.dma(), pool.size(), 0)?.expect("a container translates");
        own.link(0, base, pool.size(), hw_model::iommu::LeafSize::Large)?;
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
    fn try_some(&mut self, seed: u64, modelled: &Side, counts: &mut Counts) -> Result<(), Failed> {
        let mut pages: Vec<(Iova, Option<PhysAddr>)> = vec![];
        for slot in 0..SLOTS {
            pages.extend(modelled.pages(slot).into_iter().map(|(iova, phys, _)| (iova, phys)));
        }
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        for _ in 0..PROBES.min(pages.len()) {
            // Half of them among those that lead somewhere, if there are any.
            let linked: Vec<_> = pages.iter().filter(|(_, phys)| phys.is_some()).collect();
            let (iova, phys) = match random.random_ratio(1, 2) && !linked.is_empty() {
                true => *linked[random.random_range(0..linked.len())],
                false => pages[random.random_range(0..pages.len())],
            };
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
