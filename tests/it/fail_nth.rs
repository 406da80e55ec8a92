//! Every verb with every one of its fallible steps failing in turn. After each failure all counts are what they were.

use crate::bed::{Bed, hears_of_drops};
use crate::checks::{Counts, PATIENCE, until, within};
use crate::remapped::Remapped;
use anypage::machine::MachineConfig;
use hw_model::addr::{DmaAddr, PAGE_SIZE, RegionAddr, page_bytes};
use hw_model::fault_plan::{FaultPlan, Point, Points};
use hw_model::hca::{
    Access as Rights, CompletionQueue, FastKeySpec, FastMap, FastMemory, IndirectEntry, IndirectList,
    IndirectTarget, Pd, QpSpec, SendRequest, Sge, Status,
};
use hw_model::sync::Arc;
use mr::{Cache, CacheConfig, Device, Flush, PinKind, RegisterOptions, Rereg};
use odp::fault::Want;
use odp::space::process::{Options, ProcessSpace};
use odp::space::{Access, AddressSpace, UserRange};
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

/// Pages of the near region; as many again are memory to register.
const PAGES: u64 = 64;

/// What verbs are tried on: a connected pair of regions, and memory for more, all under one plan.
pub struct Stand {
    pub plan: Arc<FaultPlan>,
    pub bed: Bed,
    /// Memory whose pages are all there.
    pub present: UserRange,
    /// How long counts may take to come back.
    pub patience: Duration,
    memory: Arc<Remapped>,
}

impl Stand {
    pub fn new(iommu: bool) -> Self {
        let plan = FaultPlan::new(0, Vec::new());
        let space = ProcessSpace::with_points(Options::default(), Points::with(&plan)).expect("a space");
        let memory = Remapped::new(2 * PAGES);
        let whole = memory.user_range(Arc::clone(&space) as _);
        let near = whole.part(0, page_bytes(PAGES)).expect("in it");
        let present = whole.part(page_bytes(PAGES), page_bytes(PAGES)).expect("in it");
        let config = MachineConfig { iommu, points: Points::with(&plan), ..MachineConfig::default() };
        let bed = Bed::new(&space, &near, RegisterOptions::on_demand(), &config);
        space.fault(present.range(), Access::Write, &mut Vec::new()).expect("mapped");
        Self { plan, bed, present, patience: PATIENCE, memory }
    }

    fn counts(&self) -> Counts {
        Counts::of(&self.bed.machine, &self.bed.space)
    }
}

/// What a verb made: dropping it undoes it.
pub type Made = Box<dyn Any>;

/// How a sweep went.
#[derive(Clone, Debug)]
pub struct Row {
    pub verb: &'static str,
    /// Different points that failed.
    pub points: Vec<Point>,
    /// Failures injected.
    pub injected: u64,
    /// Of those, the ones that the verb got over by itself.
    pub survived: u64,
}

/// Runs `verb` with its first, second, ... fallible step failing, until none is left. What it says is the first leak.
pub fn sweep(
    stand: &Stand,
    name: &'static str,
    verb: impl FnMut() -> Result<Made, String>,
) -> Result<Row, String> {
    sweep_over(&stand.plan, stand.patience, || stand.counts(), name, verb)
}

/// The same for verbs under `plan` that may leave no trace in `counts`, if they are given `patience` to come back.
pub fn sweep_over<C: PartialEq + Debug>(
    plan: &FaultPlan,
    patience: Duration,
    counts: impl Fn() -> C,
    name: &'static str,
    mut verb: impl FnMut() -> Result<Made, String>,
) -> Result<Row, String> {
    let mut row = Row { verb: name, points: Vec::new(), injected: 0, survived: 0 };
    for nth in 1..1000 {
        let before = counts();
        plan.fail_nth_from_now(nth);
        let outcome = verb();
        let failed = plan.failed_at();
        plan.disarm();
        let succeeded = outcome.is_ok();
        let said = outcome.map(drop).err();
        if !within(patience, || counts() == before) {
            let after = counts();
            let leak = format!("leaked: {before:?} before, {after:?} after");
            return Err(format!("{name}, failure {nth} at {failed:?} ({said:?}): {leak}"));
        }
        match failed {
            Some(point) => {
                row.injected += 1;
                row.survived += u64::from(succeeded);
                if !row.points.contains(&point) {
                    row.points.push(point);
                }
            }
            None if succeeded => return Ok(row),
            None => return Err(format!("{name} failed though nothing was injected: {said:?}")),
        }
    }
    Err(format!("{name} has no end of fallible steps"))
}

fn registers(stand: &Stand, options: RegisterOptions) -> Result<Made, String> {
    let region = Arc::clone(&stand.bed.near.pd).register(&stand.present, options);
    region.map(|region| Box::new(region) as Made).map_err(|error| error.to_string())
}

/// Brings pages of the near region in by `how`, and takes them away again.
fn brings(stand: &Stand, how: impl FnOnce() -> Result<(), String>) -> Result<Made, String> {
    let took = how();
    // Whatever came in goes again, also where a later step failed: pages that came before are no leak.
    stand.memory.discard(0, PAGES);
    let region = Arc::clone(&stand.bed.near.region);
    assert!(until(|| region.report().present == 0), "dropped pages leave the region");
    took.map(|()| Box::new(()) as Made)
}

/// A key for fast registration is made, registered and invalidated, by requests of a queue pair of its own.
fn registers_fast(stand: &Stand, (pd, cq): (Pd, &Arc<CompletionQueue>)) -> Result<Made, String> {
    let hca = stand.bed.machine.near.hca();
    let key = hca.create_fast_key(FastKeySpec { pd, max_entries: 1 }).map_err(|error| error.to_string())?;
    let carry_out = || {
        let memory = IndirectEntry { target: IndirectTarget::Dma(DmaAddr(0)), length: PAGE_SIZE };
        let memory = FastMemory::Gaps(IndirectList::new(vec![memory]).expect("one entry"));
        hca.map_fast_key(key, FastMap { address: RegionAddr(0), memory }).expect("room for one entry");
        let qp = hca.create_qp(&QpSpec::new(pd, cq)).map_err(|error| error.to_string())?;
        qp.connect(qp.address()).map_err(|error| error.to_string())?;
        let requests = [SendRequest::register(1, key, Rights::REMOTE_READ), SendRequest::invalidate(2, key)];
        qp.post_send_list(&requests).map_err(|(_, error)| error.to_string())?;
        let mut ended = Vec::new();
        while ended.len() < requests.len() {
            let left = requests.len() - ended.len();
            if cq.poll(&mut ended, left).expect("no overrun") == 0 {
                assert!(cq.wait(stand.patience), "a posted request never ended");
            }
        }
        match ended.iter().find(|ended| ended.status != Status::Success) {
            Some(failed) => Err(format!("{:?}", failed.status)),
            None => Ok(Box::new(()) as Made),
        }
    };
    let outcome = carry_out();
    hca.destroy_fast_key(key).expect("it is there");
    outcome
}

fn sweep_all(iommu: bool, visited: &mut BTreeMap<&'static str, u64>) -> Vec<Row> {
    let mut stand = Stand::new(iommu);
    let mut rows = Vec::new();
    {
        let stand = &stand;
        let near = &stand.bed.machine.near;
        let mut run = |name, verb: &mut dyn FnMut() -> Result<Made, String>| {
            rows.push(sweep(stand, name, verb).unwrap_or_else(|leak| panic!("{leak}")));
        };
        let words = |error: &dyn std::fmt::Display| error.to_string();
        run("alloc_pd", &mut || {
            Arc::clone(near).alloc_pd().map(|pd| Box::new(pd) as Made).map_err(|error| words(&error))
        });
        run("create_cq", &mut || {
            Arc::clone(near).create_cq(16).map(|cq| Box::new(cq) as Made).map_err(|error| words(&error))
        });
        run("create_qp", &mut || {
            let qp = Arc::clone(&stand.bed.near.pd).create_qp(Arc::clone(&stand.bed.near.cq), 16);
            qp.map(|qp| Box::new(qp) as Made).map_err(|error| words(&error))
        });
        run("connect", &mut || {
            let qp = Arc::clone(&stand.bed.near.pd).create_qp(Arc::clone(&stand.bed.near.cq), 16);
            let qp = qp.map_err(|error| words(&error))?;
            qp.connect(stand.bed.far.qp.endpoint()).map_err(|error| words(&error))?;
            Ok(Box::new(qp) as Made)
        });
        run("register, on demand", &mut || registers(stand, RegisterOptions::on_demand()));
        run("register, pinned", &mut || registers(stand, RegisterOptions::pinned()));
        run("register, locked", &mut || {
            // Held until the region is gone: others look at what the process has locked.
            let alone = crate::pins::ALONE.lock();
            let region = registers(stand, RegisterOptions::pinned().with_pin(PinKind::Mlock))?;
            Ok(Box::new((region, alone)) as Made)
        });
        run("deregister", &mut || {
            stand.plan.disarm();
            let region =
                Arc::clone(&stand.bed.near.pd).register(&stand.present, RegisterOptions::on_demand());
            let region = region.expect("nothing is injected");
            // Only what deregistration itself meets; it must not be able to fail.
            stand.plan.fail_nth_from_now(1);
            region.deregister();
            Ok(Box::new(region) as Made)
        });
        run("cached registration", &mut || {
            let config = CacheConfig { points: Points::with(&stand.plan), ..CacheConfig::default() };
            let space = Arc::clone(&stand.bed.space) as Arc<dyn AddressSpace>;
            let cache = Cache::new(Arc::clone(&stand.bed.near.pd), space, config);
            let lease = cache.get(&stand.present, Rights::REMOTE_READ).map_err(|error| words(&error))?;
            Ok(Box::new((lease, cache)) as Made)
        });
        for (name, options) in [
            ("rereg to other memory, on demand", RegisterOptions::on_demand()),
            ("rereg to other memory, pinned", RegisterOptions::pinned()),
        ] {
            let half =
                |n| stand.present.part(n * page_bytes(PAGES / 2), page_bytes(PAGES / 2)).expect("in it");
            run(name, &mut || {
                let region = Arc::clone(&stand.bed.near.pd).register(&half(0), options);
                let region = region.map_err(|error| words(&error))?;
                let before = (region.address(), region.len(), region.raw_entries());
                let changed = region.rereg(Rereg { memory: Some((half(1), None)), ..Rereg::default() });
                if changed.is_err() {
                    let after = (region.address(), region.len(), region.raw_entries());
                    assert!(before == after, "a change that failed changed something");
                }
                changed.map_err(|error| words(&error))?;
                Ok(Box::new(region) as Made)
            });
        }
        run("register, implicit, and fault a part in", &mut || {
            let options = RegisterOptions::implicit();
            let region = Arc::clone(&stand.bed.near.pd).register(&stand.present, options);
            let region = region.map_err(|error| words(&error))?;
            region.advise(0, region.len(), Want::Fault(Access::Write)).map_err(|error| words(&error))?;
            Ok(Box::new(region) as Made)
        });
        let hca = near.hca();
        let objects = (hca.alloc_pd().expect("a domain"), hca.create_cq(16).expect("a queue"));
        run("fast registration", &mut || registers_fast(stand, (objects.0, &objects.1)));
        for (name, mut verb) in crate::object_verbs::all(stand, objects.0, &objects.1) {
            run(name, &mut verb);
        }
        let region = &stand.bed.near.region;
        for (name, want) in [
            ("advise, prefetch", Want::Fault(Access::Read)),
            ("advise, prefetch to write", Want::Fault(Access::Write)),
            ("advise, no fault", Want::Snapshot),
        ] {
            run(name, &mut || {
                stand.memory.replace(0, 1, true);
                brings(stand, || region.advise(0, region.len(), want).map_err(|error| words(&error)))
            });
        }
    }
    {
        let stand = &stand;
        let region = &stand.bed.near.region;
        let piece = Sge { key: region.key(), address: region.address(), length: region.len() as u32 };
        let by_key = || {
            stand.memory.replace(0, 1, true);
            brings(stand, || {
                let advised = stand.bed.near.pd.advise(Want::Fault(Access::Write), Flush::Yes, &[piece]);
                advised.map_err(|error| error.to_string())
            })
        };
        rows.push(sweep(stand, "advise by key", by_key).unwrap_or_else(|leak| panic!("{leak}")));
    }
    // Faults, by the peer and by our own requests. A request that fails costs the connection, so that each has its own.
    for (name, ours) in [("fault by remote access", false), ("fault by work request", true)] {
        let row = fault_sweep(&mut stand, name, ours);
        rows.push(row);
    }
    for (point, visits) in stand.plan.visits() {
        *visited.entry(point.name()).or_default() += visits;
    }
    rows
}

/// As [`sweep`], for requests that meet missing pages.
fn fault_sweep(stand: &mut Stand, name: &'static str, ours: bool) -> Row {
    let mut row = Row { verb: name, points: Vec::new(), injected: 0, survived: 0 };
    for nth in 1..1000 {
        stand.bed.reconnect();
        let before = stand.counts();
        stand.plan.fail_nth_from_now(nth);
        let length = (4 * PAGE_SIZE) as u32;
        let status = match ours {
            true => stand.bed.near_does(hw_model::hca::OperationCode::Write, 100, length),
            false => stand.bed.write(100, length),
        };
        let failed = stand.plan.failed_at();
        stand.plan.disarm();
        let brought = brings(stand, || Ok(()));
        drop(brought);
        if let Err(leak) = before.are_back(&stand.bed.machine, &stand.bed.space) {
            panic!("{name}, failure {nth} at {failed:?} ({status:?}): {leak}");
        }
        let refusal = if ours { Status::LocalProtectionError } else { Status::RemoteAccessError };
        assert!(
            status == Status::Success || status == refusal,
            "{name}, failure {nth} at {failed:?}: {status:?}"
        );
        match failed {
            Some(point) => {
                row.injected += 1;
                row.survived += u64::from(status == Status::Success);
                if !row.points.contains(&point) {
                    row.points.push(point);
                }
            }
            None => {
                assert_eq!(status, Status::Success, "{name} failed though nothing was injected");
                return row;
            }
        }
    }
    panic!("{name} has no end of fallible steps");
}

#[test]
fn every_verb_survives_the_failure_of_each_of_its_steps() {
    if !hears_of_drops("every_verb_survives_the_failure_of_each_of_its_steps") {
        return;
    }
    let mut visited = BTreeMap::new();
    let mut report = Vec::new();
    for iommu in [true, false] {
        let behind = if iommu { "behind an IOMMU" } else { "without an IOMMU" };
        for row in sweep_all(iommu, &mut visited) {
            let Row { verb, points, injected, survived } = row;
            let points = points.len();
            report.push(format!("FAIL-NTH {verb} ({behind}): points {points}, injected {injected}, survived {survived}, leaks 0"));
        }
    }
    crate::dma::every_step_fails(&mut visited);
    let injected = report.len();
    println!("{}", report.join("\n"));
    println!("FAIL-NTH verbs {injected}, points {}", visited.len());
    let all =
        [&hw_model::hca::points::ALL[..], &odp::space::points::ALL, &mr::points::ALL, &mr::dma::points::ALL];
    for point in all.into_iter().flatten() {
        assert!(visited.contains_key(point.name()), "no verb ever came to {point}: is it still in the code?");
    }
}
