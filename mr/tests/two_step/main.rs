//! The two-step API beside a naive model: random sequences of calls, legal and not, with steps failing in between.
//!
//! If it fails: a call did what its documentation does not say, or left something behind.

mod calls;
mod model;

use calls::{Call, Outcome, Run, SLOTS, Stage, Step, Verb, looked_at};
use hw_model::addr::PhysAddr;
use hw_model::bounce::{BounceConfig, BouncePool};
use hw_model::bus::{Bus, BusConfig, DeviceSpec, RamMemory};
use hw_model::fault_plan::{FaultPlan, Points};
use hw_model::iommu::{Domain, DomainConfig, FlushMode};
use hw_model::sync::Arc;
use model::Model;
use mr::dma::{DmaConfig, DmaDevice, Mapping, Policy};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use std::collections::BTreeSet;

const MEMORY: PhysAddr = PhysAddr(2 << 20);

/// What a sequence runs on.
#[derive(Clone, Copy, Debug)]
struct Kind {
    granule_shift: u32,
    mode: FlushMode,
    bounces: bool,
}

struct Bed {
    stage: Stage,
    domain: Arc<Domain>,
    pool: Arc<BouncePool>,
}

fn bed(kind: Kind) -> Bed {
    let plan = FaultPlan::new(0, Vec::new());
    let config = BusConfig { bounce: Some(BounceConfig::default()), ..BusConfig::default() };
    let bus = Bus::with_config(RamMemory::new(8 << 20).expect("8 MiB"), config);
    let config =
        DomainConfig { granule_shift: kind.granule_shift, mode: kind.mode, ..DomainConfig::default() };
    let domain = Domain::new(config).expect("possible");
    let port = bus.attach(DeviceSpec::new("device").domain(&domain)).expect("room on the bus");
    let policy = if kind.bounces { Policy::Legacy } else { Policy::Coherent };
    let device =
        DmaDevice::new(port, DmaConfig { policy, points: Points::with(&plan), ..DmaConfig::default() });
    let pool = Arc::clone(bus.bounce().expect("a pool"));
    Bed { stage: Stage { device, plan, memory: MEMORY }, domain, pool }
}

/// What the model says of one step.
fn predict(
    models: &mut [Option<Model>; SLOTS],
    call: &Call,
    step: &Step,
    mapping: Option<&Mapping>,
    kind: Kind,
) -> Outcome {
    let granule = 1 << kind.granule_shift;
    let model = &mut models[call.slot];
    if let Verb::Alloc { len, .. } = call.verb {
        if model.as_ref().is_some_and(|model| !model.freed) {
            return Outcome::Skipped;
        }
        if len == 0 || len > 1 << 48 {
            return Outcome::BadRequest;
        }
        // The IOVA is the allocator's to choose: only how it lies is known.
        *model = mapping.map(|mapping| Model::new(granule, mapping.iova().0, len, kind.bounces, MEMORY));
        return Outcome::Done;
    }
    model.as_mut().map_or(Outcome::Skipped, |model| model.call(call, step.resolved))
}

/// Whether a mapping and its model are the same.
fn compare(model: &Model, mapping: &Mapping) -> Result<(), TestCaseError> {
    prop_assert_eq!(mapping.linked(), model.linked());
    prop_assert_eq!(mapping.len(), model.len);
    if model.freed {
        return Ok(());
    }
    for at in looked_at(mapping) {
        let link = model.links.get(&model.page_of(at));
        let unit = link.map_or(0, |link| link.unit.1 * model.granule);
        prop_assert_eq!(mapping.unit_at(at), unit, "unit at {:#x}", at);
        if let Some(link) = link {
            let inside = (model.inside() + at) % model.granule;
            prop_assert!(mapping.leads_to(at, link.page.offset(inside)), "{:#x} leads elsewhere", at);
        }
    }
    Ok(())
}

fn run(kind: Kind, words: &[u64], seen: &mut BTreeSet<String>) -> Result<(), TestCaseError> {
    let Bed { stage, domain, pool } = bed(kind);
    let device = Arc::clone(&stage.device);
    let mut run = Run::new(stage);
    let mut models: [Option<Model>; SLOTS] = [const { None }; SLOTS];
    for word in words {
        let call = Call::decode(*word, 1 << kind.granule_shift);
        let before = models.clone();
        let step = run.step(&call);
        let predicted = predict(&mut models, &call, &step, run.slots[call.slot].as_ref(), kind);
        if step.outcome == Outcome::Injected {
            prop_assert!(call.fail > 0 && predicted != Outcome::Skipped, "{:?}: nothing was to fail", call);
            models = before;
        } else {
            prop_assert_eq!(step.outcome, predicted, "{:?} at {:?}", call, step.resolved);
        }
        seen.insert(format!("{} {}", name(&call.verb), name(&step.outcome)));
        for (model, mapping) in models.iter().zip(&run.slots) {
            if let (Some(model), Some(mapping)) = (model, mapping) {
                compare(model, mapping)?;
            }
        }
        let linked: u64 = models.iter().flatten().map(Model::linked).sum();
        prop_assert_eq!(domain.stats().mapped_bytes, linked);
    }
    run.finish();
    device.poll_flush(0);
    device.poll_flush(u64::MAX);
    prop_assert_eq!((domain.stats().mapped_bytes, device.iova_stats().live_ranges), (0, 0));
    prop_assert_eq!(pool.stats().used, 0);
    Ok(())
}

/// The name of a variant.
fn name(value: &impl std::fmt::Debug) -> String {
    let whole = format!("{value:?}");
    whole.split([' ', '(']).next().unwrap_or_default().to_owned()
}

fn kinds() -> impl Strategy<Value = Kind> {
    let mode = prop_oneof![Just(FlushMode::Strict), Just(FlushMode::Lazy)];
    (prop_oneof![Just(11), Just(12), Just(16)], mode, any::<bool>())
        .prop_map(|(granule_shift, mode, bounces)| Kind { granule_shift, mode, bounces })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn every_sequence_of_calls_does_what_the_naive_model_does(
        kind in kinds(),
        words in prop::collection::vec(any::<u64>(), 1..80),
    ) {
        run(kind, &words, &mut BTreeSet::new())?;
    }
}

/// If this fails, the sequences no longer come to something that they are there to try.
#[test]
fn the_sequences_come_to_every_outcome() {
    let mut seen = BTreeSet::new();
    let mut state = 1_u64;
    for round in 0..600 {
        let words: Vec<u64> = (0..80)
            .map(|_| {
                // splitmix64
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                mixed ^ (mixed >> 31)
            })
            .collect();
        let granule_shift = [11, 12, 16][round % 3];
        let mode = if round % 2 == 0 { FlushMode::Strict } else { FlushMode::Lazy };
        run(Kind { granule_shift, mode, bounces: round % 4 < 2 }, &words, &mut seen)
            .expect("as the model says");
    }
    for expected in [
        "Alloc Done",
        "Alloc Skipped",
        "Alloc Injected",
        "Alloc BadRequest",
        "Prepare Done",
        "Prepare Range",
        "Prepare Freed",
        "Prepare Injected",
        "Link Done",
        "Link Range",
        "Link Unaligned",
        "Link AlreadyMapped",
        "Link Freed",
        "Link Injected",
        "LinkBounced Done",
        "LinkBounced NoPool",
        "LinkBounced AlreadyMapped",
        "LinkBounced Injected",
        "LinkScattered Done",
        "LinkScattered Range",
        "LinkScattered Granule",
        "LinkScattered AlreadyMapped",
        "LinkScattered Injected",
        "Sync Done",
        "Sync Range",
        "Sync Freed",
        "Sync Injected",
        "Copy Done",
        "Copy Range",
        "Copy Freed",
        "Unlink Done",
        "Unlink Range",
        "Unlink Hole",
        "Unlink PartOfLeaf",
        "Unlink Freed",
        "Destroy Done",
        "Destroy Hole",
        "Destroy Freed",
        "Free Done",
        "Free StillLinked",
        "Destroy StillLinked",
    ] {
        assert!(seen.contains(expected), "no sequence came to {expected}: {seen:?}");
    }
    assert!(!seen.iter().any(|outcome| outcome.contains("Unexpected")), "{seen:?}");
}
