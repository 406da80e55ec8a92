//! Every step of the two-step API failing in turn, for every kind of device. After each failure nothing is left.

use hw_model::addr::{PAGE_SIZE, PhysAddr};
use hw_model::bounce::{BounceConfig, BouncePool};
use hw_model::bus::{Bus, BusConfig, DeviceSpec, RamMemory};
use hw_model::fault_plan::{FaultPlan, Points};
use hw_model::hca::Backing;
use hw_model::iommu::{Domain, DomainConfig, FlushMode, LeafSize};
use hw_model::sync::Arc;
use mr::dma::{DmaConfig, DmaDevice, Extent, Mapping, Policy, Segments};
use std::collections::BTreeMap;

/// A device of the policy `legacy` and all that can leak.
struct Stand {
    plan: Arc<FaultPlan>,
    device: Arc<DmaDevice>,
    domain: Arc<Domain>,
    pool: Arc<BouncePool>,
}

impl Stand {
    fn new(granule_shift: u32, mode: FlushMode) -> Self {
        let plan = FaultPlan::new(0, Vec::new());
        let config = BusConfig { bounce: Some(BounceConfig::default()), ..BusConfig::default() };
        let bus = Bus::with_config(RamMemory::new(1 << 20).expect("1 MiB"), config);
        let domain =
            Domain::new(DomainConfig { granule_shift, mode, ..DomainConfig::default() }).expect("possible");
        let spec = DeviceSpec::new("stranger").domain(&domain).untrusted();
        let points = Points::with(&plan);
        let config = DmaConfig { policy: Policy::Legacy, points, ..DmaConfig::default() };
        let device = DmaDevice::new(bus.attach(spec).expect("room on the bus"), config);
        Self { plan, device, domain, pool: Arc::clone(bus.bounce().expect("a pool")) }
    }

    /// IOVA ranges, bytes mapped, slots taken, contract broken.
    fn left(&self) -> [u64; 4] {
        let (iova, domain) = (self.device.iova_stats(), self.domain.stats());
        [iova.live_ranges, domain.mapped_bytes, self.pool.stats().used, domain.violations]
    }

    /// Bounced head, direct middle, bounced tail; then scattered pages behind a hole. Who fails unlinks what it linked.
    fn maps(&self) -> Result<(), String> {
        const PAGES: u64 = 16;
        let (at, len) = (0x8200, 2 * PAGE_SIZE);
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let mapping =
            Mapping::try_alloc(&self.device, PAGES * PAGE_SIZE, at).map_err(|error| words(&error))?;
        let mapping = mapping.expect("something translates");
        mapping.prepare(0, mapping.len()).map_err(|error| words(&error))?;
        let extent = Extent {
            at: 0,
            phys: PhysAddr(at),
            len,
            backing: Backing::Anonymous,
            provider: None,
            writable: true,
        };
        let mut linked = Vec::new();
        // The tail ends inside an IO page, which only the end of a mapping may: its IO page is left out.
        let segments: Vec<_> =
            Segments::new(&self.device, [extent]).collect::<Result<_, _>>().expect("a way");
        let [whole @ .., _tail] = &segments[..] else { panic!("a head, a middle and a tail") };
        let mut outcome = whole.iter().try_for_each(|segment| {
            mapping.link_segment(segment, LeafSize::Huge)?;
            linked.push((segment.at, segment.len));
            Ok(())
        });
        let first_edge = PAGE_SIZE - at % PAGE_SIZE;
        if outcome.is_ok() && mapping.granule() <= PAGE_SIZE {
            let scattered = first_edge + 8 * PAGE_SIZE;
            let frames = [9, 4, 30].map(|page| PhysAddr(page * PAGE_SIZE));
            outcome = mapping.link_scattered(scattered, frames);
            if outcome.is_ok() {
                linked.push((scattered, 3 * PAGE_SIZE));
            }
        }
        let outcome = outcome
            .and_then(|()| mapping.sync(0, mapping.len()))
            .and_then(|()| mapping.sync_for_device(0, mapping.len()));
        for (offset, len) in linked {
            mapping.unlink(offset, len).expect("taking down never fails");
        }
        mapping.free().expect("taking down never fails");
        outcome.map_err(|error| words(&error))
    }
}

/// Sweeps all; counts the points that were visited.
pub fn every_step_fails(visited: &mut BTreeMap<&'static str, u64>) {
    for granule_shift in [11, 12] {
        for mode in [FlushMode::Strict, FlushMode::Lazy] {
            let stand = Stand::new(granule_shift, mode);
            let before = stand.left();
            let mut injected = 0;
            for nth in 1.. {
                stand.plan.fail_nth_from_now(nth);
                let outcome = stand.maps();
                let failed = stand.plan.failed_at();
                stand.plan.disarm();
                let at = format!("IO pages of 2^{granule_shift}, {mode:?}, failure {nth} at {failed:?}");
                assert_eq!(stand.left(), before, "{at}: {outcome:?}");
                if failed.is_none() {
                    outcome.expect(&at);
                    break;
                }
                outcome.expect_err(&at);
                injected += 1;
            }
            assert!(injected >= 7, "reserve, prepare, links, bounces and sync; {injected} failed");
            for (point, visits) in stand.plan.visits() {
                *visited.entry(point.name()).or_default() += visits;
            }
        }
    }
}

#[test]
fn every_step_of_the_two_step_api_fails_and_leaves_nothing() {
    every_step_fails(&mut BTreeMap::new());
}
