//! One page of a region goes and comes back: invalidation, fault, relink. In regions of 1 MiB to 1 TiB, and beside 10,000
//! other regions.
//!
//! Expected: independent of the region's size. A populate and a scan of one page (about 1 us together), a membarrier, one
//! unlink with its IOTLB flush, one link, one store. With 10,000 regions over one space an invalidation finds the one that
//! overlaps in a tree of some fourteen levels. The first page that goes of 2 MiB that were resident at registration splits the
//! leaf that they lie in: 512 stores one after the other, some 0.3 us, once.
//!
//! Targets: one list write, one link and one unlink a page at any size (counted); time within a factor of two from 1 MiB to
//! 1 TiB; with 10,000 regions no more callbacks than with one (counted).

use anypage::machine::{Machine, MachineConfig};
use anypage::mixed::{Kind, MixedMemory};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use hw_model::addr::{PAGE_SIZE, VirtRange};
use hw_model::sync::Arc;
use mr::{Device, ProtectionDomain, Region, RegisterOptions};
use odp::fault::Want;
use odp::space::process::{Options, ProcessSpace};
use odp::space::{Access, AddressSpace};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SIZES: [u64; 5] = [MIB, 64 * MIB, 1 << 30, 16 << 30, 1 << 40];
/// Regions that are there besides.
const OTHERS: u64 = 10_000;

struct Stand {
    space: Arc<ProcessSpace>,
    machine: Machine,
    pd: Arc<dyn ProtectionDomain>,
}

fn stand() -> Stand {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
    let pd = Arc::clone(&machine.near).alloc_pd().expect("a protection domain");
    Stand { space, machine, pd }
}

/// A region, and the page in its middle.
struct Place {
    region: Arc<dyn Region>,
    page: VirtRange,
    offset: u64,
}

impl Stand {
    fn place(&self, size: u64) -> Place {
        let memory = Arc::new(MixedMemory::new(&[(Kind::Untouched, size)]).expect("address space"));
        let range = memory.user_range(Arc::clone(&self.space) as _);
        let region = Arc::clone(&self.pd).register(&range, RegisterOptions::on_demand()).expect("a region");
        let offset = size / 2;
        let page = VirtRange::new(memory.range().start().offset(offset), PAGE_SIZE).expect("a page of it");
        let place = Place { region, page, offset };
        place.fault();
        place
    }

    fn relink(&self, place: &Place) {
        self.space.notifiers().invalidate(place.page, || ());
        place.fault();
    }

    /// The shortest of many.
    fn shortest(&self, place: &Place) -> Duration {
        let once = |_| {
            let start = Instant::now();
            self.relink(place);
            start.elapsed()
        };
        (0..2000).map(once).min().expect("some")
    }
}

impl Place {
    fn fault(&self) {
        let fault = Want::Fault(Access::Write);
        self.region.advise(self.offset, PAGE_SIZE, fault).expect("the page can be had");
    }
}

fn relink(c: &mut Criterion) {
    let stand = stand();
    let domain = Arc::clone(stand.machine.near.dma().domain().expect("behind an IOMMU"));
    let mut group = c.benchmark_group("relink_one_page");
    let mut shortest = Vec::new();
    for size in SIZES {
        let place = stand.place(size);
        let (before, mapped) = (place.region.counters(), domain.stats());
        stand.relink(&place);
        let (done, now) = (place.region.counters() - before, domain.stats());
        assert_eq!((done.entries_published, done.links, done.syncs, done.unlinks), (1, 1, 1, 1), "at {size}");
        let leaves = |now: [u64; 3], then: [u64; 3]| now[0] - then[0] + now[1] - then[1] + now[2] - then[2];
        assert_eq!(leaves(now.leaves_mapped, mapped.leaves_mapped), 1, "one entry of the IOMMU at {size}");
        assert_eq!(leaves(now.leaves_unmapped, mapped.leaves_unmapped), 1);
        shortest.push(stand.shortest(&place));
        group.bench_function(BenchmarkId::from_parameter(size), |b| b.iter(|| stand.relink(&place)));
    }
    group.finish();
    let (least, most) = (shortest.iter().min().expect("some"), shortest.iter().max().expect("some"));
    let factor = most.as_secs_f64() / least.as_secs_f64();
    println!(
        "relink one page, 1 MiB to 1 TiB: shortest {shortest:?}, within a factor of {factor:.2} (target 2)"
    );
}

/// Pages of what was resident at registration: the first that goes of a leaf, and the next.
fn split(_: &mut Criterion) {
    let stand = stand();
    let domain = Arc::clone(stand.machine.near.dma().domain().expect("behind an IOMMU"));
    let memory = Arc::new(MixedMemory::new(&[(Kind::Anonymous, 64 * MIB)]).expect("memory"));
    let range = memory.user_range(Arc::clone(&stand.space) as _);
    drop(Arc::clone(&stand.pd).register(&range, RegisterOptions::pinned()).expect("a region"));
    let region = Arc::clone(&stand.pd).register(&range, RegisterOptions::on_demand()).expect("a region");
    let mut times = [Vec::new(), Vec::new()];
    for leaf in 0..32 {
        let offset = leaf * 2 * MIB + MIB;
        let page = VirtRange::new(memory.range().start().offset(offset), PAGE_SIZE).expect("a page of it");
        let place = Place { region: Arc::clone(&region), page, offset };
        for (times, entries) in times.iter_mut().zip([513, 1]) {
            let before = domain.stats().leaves_mapped[0];
            let start = Instant::now();
            stand.relink(&place);
            times.push(start.elapsed());
            assert_eq!(domain.stats().leaves_mapped[0] - before, entries, "512 for the leaf, once");
        }
    }
    let [first, next] = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2]
    });
    println!("relink a page of a leaf of 2 MiB: {first:?} the first time, {next:?} from then on");
}

fn crowd(c: &mut Criterion) {
    let stand = stand();
    let place = stand.place(MIB);
    let alone = stand.shortest(&place);
    let memory = Arc::new(MixedMemory::new(&[(Kind::Untouched, OTHERS * PAGE_SIZE)]).expect("memory"));
    let range = memory.user_range(Arc::clone(&stand.space) as _);
    let others: Vec<_> = (0..OTHERS)
        .map(|page| {
            let part = range.part(page * PAGE_SIZE, PAGE_SIZE).expect("in it");
            Arc::clone(&stand.pd).register(&part, RegisterOptions::on_demand()).expect("a region")
        })
        .collect();
    let before = stand.space.notifiers().stats();
    stand.relink(&place);
    let after = stand.space.notifiers().stats();
    assert_eq!(after.visits - before.visits, 1, "of {} regions, the one that overlaps", others.len() + 1);
    let crowded = stand.shortest(&place);
    println!("relink one page beside {OTHERS} regions: {crowded:?}, alone {alone:?}");
    c.bench_function("relink_one_page_beside_10000", |b| b.iter(|| stand.relink(&place)));
}

criterion_group!(benches, relink, split, crowd);
criterion_main!(benches);
