//! One page of a region goes and comes back: invalidation, fault, relink. In regions of 1 MiB to 16 GiB.
//!
//! Expected: independent of the region's size. A populate and a scan of one page (about 1 us together), a membarrier, one
//! unlink with its IOTLB flush, one link, one store.

use anypage::machine::{Machine, MachineConfig};
use anypage::mixed::{Kind, MixedMemory};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use hw_model::addr::{PAGE_SIZE, VirtRange};
use hw_model::sync::Arc;
use mr::{Device, RegisterOptions};
use odp::fault::Want;
use odp::space::process::{Options, ProcessSpace};
use odp::space::{Access, AddressSpace};

fn relink(c: &mut Criterion) {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
    let pd = Arc::clone(&machine.near).alloc_pd().expect("a protection domain");
    let mut group = c.benchmark_group("relink_one_page");
    for size in [1 << 20, 64 << 20, 1 << 30, 16_u64 << 30] {
        let memory = Arc::new(MixedMemory::new(&[(Kind::Untouched, size)]).expect("memory"));
        let range = memory.user_range(Arc::clone(&space) as _);
        let region = Arc::clone(&pd).register(&range, RegisterOptions::on_demand()).expect("a region");
        let offset = size / 2;
        let page = VirtRange::new(memory.range().start().offset(offset), PAGE_SIZE).expect("a page of it");
        let fault =
            || region.advise(offset, PAGE_SIZE, Want::Fault(Access::Write)).expect("the page can be had");
        fault();
        group.bench_function(BenchmarkId::from_parameter(size), |b| {
            b.iter(|| {
                space.notifiers().invalidate(page, || ());
                fault();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, relink);
criterion_main!(benches);
